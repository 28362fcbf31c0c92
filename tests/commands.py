"""Running the command in separate processes, which tests can kill."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from tests.golden_cases import CHECKPOINT, TOLERANCE, relative_error

COMMAND = Path(sys.executable).with_name("transcriptformer")


def inference_command(*options: object, checkpoint: Path = CHECKPOINT) -> list[str]:
    fixed = ["inference", "--checkpoint-path", checkpoint, "--precision", "32", "--device", "cpu"]
    return [str(part) for part in (COMMAND, *fixed, *options)]


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def default_signals() -> None:
    """Make a child process handle signals by default, and end with the process of the tests.

    Background commands of non-interactive shells, and nohup, ignore signals.
    """
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def start(command: list[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command in a new process group."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=default_signals,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},  # more threads slow it down on a busy machine
    )


def finish(process: subprocess.Popen[str], kill_after: float | None = None) -> subprocess.CompletedProcess[str]:
    """Wait for a process, or kill its process group after a delay as schedulers do; nothing is left running."""
    try:
        process.wait(300 if kill_after is None else kill_after)
    except subprocess.TimeoutExpired:
        assert kill_after is not None, "command timed out"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_command(*options: object, kill_after: float | None = None) -> subprocess.CompletedProcess[str]:
    return finish(start(inference_command(*options)), kill_after)


def read_result(path: Path) -> anndata.AnnData:
    return anndata.read_zarr(path) if path.suffix == ".zarr" else anndata.read_h5ad(path)


def assert_same(result: anndata.AnnData, expected: anndata.AnnData) -> None:
    """Assert the same cells in the same order, with the same metadata and results."""
    assert list(result.obs_names) == list(expected.obs_names)
    pd.testing.assert_frame_equal(result.obs, expected.obs)
    assert result.obsm.keys() == expected.obsm.keys()
    for key in expected.obsm:
        assert relative_error(result.obsm[key], expected.obsm[key]) < TOLERANCE
    assert result.uns.keys() == expected.uns.keys()
    for key in expected.uns.keys() - {"transcriptformer"}:
        actual, desired = np.asarray(result.uns[key]), np.asarray(expected.uns[key])
        if desired.dtype.kind == "f":
            assert np.isnan(desired).all() or relative_error(actual, desired) < TOLERANCE
        else:
            np.testing.assert_array_equal(actual, desired)
