import shutil
from pathlib import Path

import pytest

from tests.golden_cases import CHECKPOINT


@pytest.fixture
def checkpoint_copy(tmp_path: Path) -> Path:
    """A copy of the synthetic checkpoint that a test may damage."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
