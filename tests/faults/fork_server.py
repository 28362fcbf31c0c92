"""Run the command in forked processes, one after the other, under the preloaded shim.

Importing everything takes seconds; a forked process inherits the imports. `injection.command_server` starts this
script and sends requests as lines of JSON.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

IMPORTED = (
    *("anndata", "boto3", "h5py", "matplotlib.backends.backend_agg", "transformers", "typer._adapters", "zarr"),
    *("transformers.models.esm.modeling_esm", "hydra", "omegaconf"),
    *("transcriptformer.cli.main", "transcriptformer.cli.reporting", "transcriptformer.fetching.weights"),
    *("transcriptformer.inference.run", "transcriptformer.training.run", "transcriptformer.proteins.embed"),
    "transcriptformer.proteins.ensembl",
)
"""Modules that the commands import at run time."""


def serve() -> None:
    """Handle requests until stdin closes; in a forked process, return to run the command."""
    for name in IMPORTED:
        importlib.import_module(name)
    n_threads = len(list(Path("/proc/self/task").iterdir()))
    if n_threads > 1:
        raise SystemExit(f"imports started {n_threads - 1} threads, which forked processes would lack")
    gc.freeze()
    shim = ctypes.CDLL(None)
    shim.faults_n_calls.restype = shim.faults_n_failed.restype = ctypes.c_long
    shim.faults_call.restype = ctypes.c_char_p
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        fault = request["fault"]
        shim.faults_arm(
            *(os.fsencode(request["folder"]), ctypes.c_long(fault["call"]), fault["error"]),
            *(fault["for_good"], fault["deletions_work"]),
        )
        process = os.fork()
        if process == 0:
            _become(request)
            return
        status = _wait(process, request["seconds"])
        shim.faults_disarm()
        calls = [shim.faults_call(ctypes.c_long(n + 1)).decode() for n in range(shim.faults_n_calls())]
        answer = {"status": status, "calls": calls, "n_failed": shim.faults_n_failed()}
        print(json.dumps(answer), file=answers, flush=True)
    raise SystemExit


def _become(request: dict[str, Any]) -> None:
    """Set up a forked process to run the command."""
    os.setpgid(0, 0)
    for descriptor, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(request["environment"])
    for name, value in request["constants"].items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    sys.argv = ["transcriptformer", *request["arguments"]]


def _wait(process: int, seconds: float) -> int | None:
    """Exit code of a process (negative: signal number), or None if it timed out and was killed."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended or time.monotonic() > until:
            break
        time.sleep(0.002)
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # including leftover children
    if not ended:
        os.waitpid(process, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def _exit(code: int) -> None:
    """Exit like the interpreter, but without freeing every object, which is slower than the command."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).exit(code)  # runs exit handlers of C libraries, such as HDF5


if __name__ == "__main__":
    serve()
    from transcriptformer.cli.main import app

    try:
        app()
    except SystemExit as ended:
        _exit(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
