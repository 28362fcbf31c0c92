"""The command with failing calls: in processes forked from one that has the shim preloaded and everything imported."""

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
"""A command that takes longer hangs; each is done in a second or two on an idle machine."""


@dataclass(frozen=True)
class Fault:
    """Which calls fail.

    Attributes
    ----------
    call
        Number of the first one, from 1; 0: none.
    error
        What they fail with.
    for_good
        Whether later ones fail too.
    """

    call: int = 0
    error: int = 0
    for_good: bool = False

    @property
    def deletions_work(self) -> bool:
        """A full disk still deletes; one that is broken does not."""
        return self.error == errno.ENOSPC

    def __str__(self) -> str:
        return f"call {self.call} fails with {errno.errorcode[self.error]} {'for good' if self.for_good else 'once'}"


NO_FAULT = Fault()


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes
    ----------
    status
        Exit code; negative: the signal that ended it; None: it had to be killed.
    stderr
        What it said.
    calls
        Calls that change files below its folder: name and path of each.
    n_failed
        How many of them failed.
    """

    status: int | None
    stderr: str
    calls: list[str]
    n_failed: int

    @property
    def errors(self) -> list[str]:
        """Lines that say what is wrong."""
        return [line for line in self.stderr.splitlines() if line.startswith("ERROR: ")]

    def deletion_failed(self, fault: Fault) -> bool:
        """Whether something could not be deleted, which may then be left behind."""
        failed = self.calls[fault.call - 1 :] if fault.for_good and not fault.deletions_work else []
        failed += self.calls[fault.call - 1 : fault.call] if fault.call else []
        return any(call.startswith(("unlink ", "rmdir ")) for call in failed)


def why_not_here() -> str:
    """Why the shim cannot be built or used, if so."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return "calls are made to fail by preloading a library, which is written for Linux with glibc"
    if shutil.which("cc") is None:
        return "no C compiler (cc) to build the library that makes calls fail"
    return ""


def build_shim(folder: Path) -> Path:
    """Compile the library to be preloaded."""
    shim = folder / "shim.so"
    options = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *options, "-o", shim, HERE / "shim.c", "-ldl"], check=True)
    return shim


@dataclass
class CommandServer:
    """Runs commands one after the other.

    Attributes
    ----------
    process
        The process that they are forked from.
    scratch
        Folder for what they print.
    constants
        Values of module constants, by dotted name: such that even a small run keeps results often.
    """

    process: subprocess.Popen[str]
    scratch: Path
    constants: Mapping[str, Any] = field(default_factory=dict)

    def run(self, arguments: Sequence[object], folder: Path, fault: Fault, environment: Mapping[str, str]) -> Ended:
        """Run a command, of whose calls below `folder` some fail."""
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
        return Ended(answer["status"], stderr.read_text(), answer["calls"], answer["n_failed"])

    def _ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@contextmanager
def command_server(scratch: Path, constants: Mapping[str, Any]) -> Iterator[CommandServer]:
    """Start the process that commands are forked from, and end it."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(build_shim(scratch)),
        "OMP_NUM_THREADS": "1",
        # pyarrow would start a thread, which a forked process would lack.
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
