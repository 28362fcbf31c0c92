import os
import shutil
from pathlib import Path

# For models of this size a second thread costs more than it brings; here and in the commands that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from tests.golden_cases import CHECKPOINT

# How long an example takes says something about the machine, not about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture
def checkpoint_copy(tmp_path: Path) -> Path:
    """A copy of the synthetic checkpoint that a test may damage."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
