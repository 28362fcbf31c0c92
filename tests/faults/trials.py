"""Runs of a command that meet a fault, and what must be true of them."""

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np

from tests.faults.cases import Arrays, Case
from tests.faults.injection import NO_FAULT, CommandServer, Ended, Fault

TOLERANCE = 1e-6
"""Of continued runs, whose batches may be others than those of the unbroken one."""


class Trials:
    """Runs one command, first unbroken, then with one fault after the other.

    Parameters
    ----------
    server
        Runs it.
    case
        The command.
    output
        Its output folder, which is emptied before each run.

    Attributes
    ----------
    calls
        What the unbroken run does below the folder.
    continued
        How continuing ended, by the state of the folder it began with; folders in the same state are continued once.
    """

    def __init__(self, server: CommandServer, case: Case, output: Path) -> None:
        self.server, self.case, self.output = server, case, output
        self.continued: dict[str, str] = {}
        unbroken = self._run()
        assert unbroken.status == 0, unbroken.stderr
        self.calls, self.expected = unbroken.calls, case.read(self._result)
        assert self.calls, "no call is counted"
        assert not left_behind(output)

    def meet(self, fault: Fault) -> tuple[str, str]:
        """How a run with a fault ended, and how the same command went on.

        Raises
        ------
        AssertionError
            If either is wrong: its first line says how.
        """
        shutil.rmtree(self.output, ignore_errors=True)
        ended = self._run(fault)
        self._check_end(ended, fault)
        went_on = self._continue(ended.deletion_failed(fault))
        if ended.n_failed == 0:
            return "not met", went_on
        return "one ERROR line" if ended.errors else "success", went_on

    def _check_end(self, ended: Ended, fault: Fault) -> None:
        assert ended.status is not None, "hangs"
        assert ended.status >= 0, f"ended by signal {-ended.status}\n{ended.stderr}"
        assert "Traceback" not in ended.stderr, f"traceback\n{ended.stderr}"
        assert len(ended.errors) == (ended.status != 0), f"{len(ended.errors)} ERROR lines\n{ended.stderr}"
        assert ended.status in (0, 1), f"exit code {ended.status}\n{ended.stderr}"
        if self._result.exists():
            self._check_result("wrong result")
        else:
            assert ended.status == 1, f"no result\n{ended.stderr}"
        if not ended.deletion_failed(fault):
            assert not (left := left_behind(self.output)), f"temporary files are left\n{left}\n{ended.stderr}"

    def _continue(self, deletion_failed: bool) -> str:
        state = state_of(self.output)
        if state not in self.continued:
            ended = self._run(options=self.case.go_on)
            assert ended.status == 0, f"cannot be continued\n{ended.stderr}"
            assert "Traceback" not in ended.stderr, f"continued with a traceback\n{ended.stderr}"
            error = self._check_result("continued to a wrong result")
            others = {path.name for path in self.output.iterdir()} - {self.case.result} - self.case.leaves
            assert deletion_failed or not others, f"continued, and files are left\n{others}"
            self.continued[state] = "equal bit for bit" if error == 0 else f"equal to {TOLERANCE:.0e}"
        return self.continued[state]

    def _check_result(self, problem: str) -> float:
        try:
            error = difference(self.case.read(self._result), self.expected)
        except Exception as unreadable:
            raise AssertionError(f"{problem}\n{unreadable!r}") from unreadable
        assert error < TOLERANCE, f"{problem}\nrelative error {error:.1e}"
        return error

    @property
    def _result(self) -> Path:
        return self.output / self.case.result

    def _run(self, fault: Fault = NO_FAULT, options: tuple[str, ...] = ()) -> Ended:
        arguments = [*self.case.arguments(self.output), *options]
        return self.server.run(arguments, self.output, fault, self.case.environment)


def difference(found: Arrays, expected: Arrays) -> float:
    """The largest ‖a−b‖/‖b‖ of arrays of floats, 0 where all bits are equal; everything else must be the same."""
    assert found.keys() == expected.keys()
    largest = 0.0
    for name, wanted in expected.items():
        array = found[name]
        assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype), name
        if wanted.dtype.kind != "f":
            np.testing.assert_array_equal(array, wanted, name)
        elif array.tobytes() != wanted.tobytes():
            np.testing.assert_array_equal(np.isnan(array), np.isnan(wanted), name)
            a, b = np.nan_to_num(array.astype(np.float64)), np.nan_to_num(wanted.astype(np.float64))
            largest = max(largest, float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return largest


def left_behind(folder: Path) -> list[str]:
    """What bears a temporary name."""
    is_temporary = re.compile(r".*\.(tmp|old|partial|probe)")
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if is_temporary.fullmatch(path.name)]


def state_of(folder: Path) -> str:
    """A hash of all that lies there, but for random names and numbers, and for times."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        if path.name == "metrics.csv":
            content = re.sub(rb"(?m)^(\d+,[^,]*,)[^,]*", rb"\1", content)  # seconds
        for part in (str(path.relative_to(folder)).encode(), content):
            digest.update(re.sub(rb"[0-9a-f]{8,}", b"#", part) + b"\0")
    return digest.hexdigest()
