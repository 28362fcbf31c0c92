import os
import shutil
import signal
from pathlib import Path

# For models of this size a second thread costs more than it brings; here and in the commands that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from tests.golden_cases import CHECKPOINT

# Non-interactive shells start background commands with SIGINT ignored, and nohup with SIGHUP, which commands inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long an example takes says something about the machine, not about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture
def checkpoint_copy(tmp_path: Path) -> Path:
    """A copy of the synthetic checkpoint that a test may damage."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the fault tests have counted."""
    reports = [report for several in terminalreporter.stats.values() for report in several]
    properties = [pair for report in reports for pair in getattr(report, "user_properties", [])]
    for line in sorted({str(value) for name, value in properties if name == "faults"}):
        terminalreporter.write_line(line)
