"""Run the command with failing system calls, in forks of a server with the shim preloaded and all imports done."""

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

SECONDS = 120
"""Timeout of a command; each takes a second or two on an idle machine."""


@dataclass(frozen=True)
class Fault:
    """Which calls fail.

    Attributes
    ----------
    call
        Number of the first failing call, from 1; 0: none.
    error
        errno of the failures.
    for_good
        Whether all later calls fail too.
    """

    call: int = 0
    error: int = 0
    for_good: bool = False

    @property
    def deletions_work(self) -> bool:
        """Whether deletions succeed: on a full disk, but not on a broken one."""
        return self.error == errno.ENOSPC

    def __str__(self) -> str:
        return f"call {self.call} fails with {errno.errorcode[self.error]} {'for good' if self.for_good else 'once'}"


NO_FAULT = Fault()


@dataclass(frozen=True)
class Outcome:
    """Outcome of a command.

    Attributes
    ----------
    status
        Exit code; negative: signal number; None: timed out and killed.
    stderr
        Standard error.
    calls
        Name and path of each call that changes files below its folder.
    n_failed
        Number of failed calls.
    """

    status: int | None
    stderr: str
    calls: list[str]
    n_failed: int

    @property
    def errors(self) -> list[str]:
        """ERROR lines."""
        return [line for line in self.stderr.splitlines() if line.startswith("ERROR: ")]

    def deletion_failed(self, fault: Fault) -> bool:
        """Whether a deletion failed, so that files may be left behind."""
        failed = self.calls[fault.call - 1 :] if fault.for_good and not fault.deletions_work else []
        failed += self.calls[fault.call - 1 : fault.call] if fault.call else []
        return any(call.startswith(("unlink ", "rmdir ")) for call in failed)


def skip_reason() -> str:
    """Reason why the shim cannot be built or used, or an empty string."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return "fault injection requires Linux with glibc"
    if shutil.which("cc") is None:
        return "fault injection requires a C compiler (cc)"
    return ""


def build_shim(folder: Path) -> Path:
    """Compile the shim library."""
    shim = folder / "shim.so"
    options = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *options, "-o", shim, HERE / "shim.c", "-ldl"], check=True)
    return shim


@dataclass
class CommandServer:
    """Run commands one after the other.

    Attributes
    ----------
    process
        Server process that forks the commands.
    scratch
        Folder for the commands' output.
    constants
        Values of module constants by dotted name, to make small runs save results often.
    """

    process: subprocess.Popen[str]
    scratch: Path
    constants: Mapping[str, Any] = field(default_factory=dict)

    def run(self, arguments: Sequence[object], folder: Path, fault: Fault, environment: Mapping[str, str]) -> Outcome:
        """Run a command with failing calls below `folder`."""
        stdout, stderr = self.scratch / "stdout", self.scratch / "stderr"
        answer = self._ask(
            arguments=[str(argument) for argument in arguments],
            folder=str(folder),
            fault={**asdict(fault), "deletions_work": fault.deletions_work},
            environment=dict(environment),
            constants=dict(self.constants),
            seconds=SECONDS,
            stdout=str(stdout),
            stderr=str(stderr),
        )
        return Outcome(answer["status"], stderr.read_text(), answer["calls"], answer["n_failed"])

    def _ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@contextmanager
def command_server(scratch: Path, constants: Mapping[str, Any]) -> Iterator[CommandServer]:
    """Start the server that forks the commands, and kill it at the end."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(build_shim(scratch)),
        "OMP_NUM_THREADS": "1",
        # Keep pyarrow from starting a thread, which forked processes would lack.
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }
    process = subprocess.Popen(
        [sys.executable, HERE / "fork_server.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield CommandServer(process, scratch, constants)
        finally:
            process.kill()
