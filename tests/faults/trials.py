"""Run a command with injected faults, and check the outcomes."""

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np

from tests.faults.cases import Arrays, Case
from tests.faults.injection import NO_FAULT, CommandServer, Fault, Outcome

TOLERANCE = 1e-6
"""Relative tolerance of resumed runs, whose batches may differ."""


class Trials:
    """Run one command, first uninterrupted, then with one fault after the other.

    Parameters
    ----------
    server
        Runs the command.
    case
        The command to run.
    output
        Output folder, emptied before each run.

    Attributes
    ----------
    calls
        Calls of the uninterrupted run.
    resumed
        Outcome of resuming by state of the folder; equal states are resumed once.
    """

    def __init__(self, server: CommandServer, case: Case, output: Path) -> None:
        self.server, self.case, self.output = server, case, output
        self.resumed: dict[str, str] = {}
        uninterrupted = self._run()
        assert uninterrupted.status == 0, uninterrupted.stderr
        self.calls, self.expected = uninterrupted.calls, case.read(self._result)
        assert self.calls, "no call is counted"
        assert not left_behind(output)

    def run(self, fault: Fault) -> tuple[str, str]:
        """Run with a fault, then resume, and return both outcomes.

        Raises
        ------
        AssertionError
            If either is wrong; the first line of the message says how.
        """
        shutil.rmtree(self.output, ignore_errors=True)
        outcome = self._run(fault)
        self._check_outcome(outcome, fault)
        resumed = self._resume(outcome.deletion_failed(fault))
        if outcome.n_failed == 0:
            return "not reached", resumed
        return "one ERROR line" if outcome.errors else "success", resumed

    def _check_outcome(self, outcome: Outcome, fault: Fault) -> None:
        assert outcome.status is not None, "hangs"
        assert outcome.status >= 0, f"ended by signal {-outcome.status}\n{outcome.stderr}"
        assert "Traceback" not in outcome.stderr, f"traceback\n{outcome.stderr}"
        assert len(outcome.errors) == (outcome.status != 0), f"{len(outcome.errors)} ERROR lines\n{outcome.stderr}"
        assert outcome.status in (0, 1), f"exit code {outcome.status}\n{outcome.stderr}"
        if self._result.exists():
            self._check_result("wrong result")
        else:
            assert outcome.status == 1, f"no result\n{outcome.stderr}"
        if not outcome.deletion_failed(fault):
            assert not (left := left_behind(self.output)), f"temporary files are left\n{left}\n{outcome.stderr}"

    def _resume(self, deletion_failed: bool) -> str:
        state = state_of(self.output)
        if state not in self.resumed:
            outcome = self._run(options=self.case.resume_options)
            assert outcome.status == 0, f"cannot be resumed\n{outcome.stderr}"
            assert "Traceback" not in outcome.stderr, f"resumed with a traceback\n{outcome.stderr}"
            error = self._check_result("resumed to a wrong result")
            others = {path.name for path in self.output.iterdir()} - {self.case.result} - self.case.leaves
            assert deletion_failed or not others, f"resumed, but files are left\n{others}"
            self.resumed[state] = "equal bit for bit" if error == 0 else f"equal to {TOLERANCE:.0e}"
        return self.resumed[state]

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

    def _run(self, fault: Fault = NO_FAULT, options: tuple[str, ...] = ()) -> Outcome:
        arguments = [*self.case.arguments(self.output), *options]
        return self.server.run(arguments, self.output, fault, self.case.environment)


def difference(found: Arrays, expected: Arrays) -> float:
    """Largest ‖a−b‖/‖b‖ of the float arrays, 0 if bitwise equal; everything else must be equal."""
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
    """Paths with temporary names."""
    is_temporary = re.compile(r".*\.(tmp|old|partial|probe)")
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if is_temporary.fullmatch(path.name)]


def state_of(folder: Path) -> str:
    """Hash of a folder's contents, except random names and numbers, and times."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        if path.name == "metrics.csv":
            content = re.sub(rb"(?m)^(\d+,[^,]*,)[^,]*", rb"\1", content)  # seconds
        for part in (str(path.relative_to(folder)).encode(), content):
            digest.update(re.sub(rb"[0-9a-f]{8,}", b"#", part) + b"\0")
    return digest.hexdigest()
