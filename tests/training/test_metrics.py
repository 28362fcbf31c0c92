"""A resumed run restores metrics.csv, whatever happened to the file."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.training_runs import assert_same_run, config_of, write_cells
from transcriptformer.training.metrics import COLUMNS, MetricsFile, read_metrics
from transcriptformer.training.run import fit

SETTINGS: dict[str, Any] = {"save_every": 2, "model__model_config__mu_link_fn": "softplus"}


class InterruptedRunError(Exception):
    """Raised to interrupt a run."""


def interrupt_at_step_7(n_done: int, n_steps: int, loss: float) -> None:
    if n_done == 7:
        raise InterruptedRunError


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cells, and a run that was trained on them."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit(config_of(folder / "run", write_cells(folder / "cells.h5ad"), **SETTINGS))
    return folder


def without_last_bytes(n: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:-n])


def with_garbage(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'5,"\xff\x00')


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(Path.unlink, id="deleted", marks=pytest.mark.slow),
        pytest.param(with_garbage, id="garbage"),
        *(pytest.param(without_last_bytes(n), id=f"-{n}", marks=pytest.mark.slow) for n in (1, 2, 12, 60, 400)),
    ],
)
def test_lost_and_incomplete_lines_are_restored(
    damage: Callable[[Path], object], uninterrupted: Path, tmp_path: Path
) -> None:
    cells = uninterrupted / "cells.h5ad"
    with pytest.raises(InterruptedRunError):
        fit(config_of(tmp_path / "run", cells, **SETTINGS), interrupt_at_step_7)
    damage(tmp_path / "run" / "metrics.csv")
    fit(config_of(tmp_path / "run", cells, resume=True, **SETTINGS))
    assert_same_run(tmp_path / "run", uninterrupted / "run")


@pytest.mark.slow
def test_a_line_that_cannot_be_written_ends_the_run_and_is_restored_on_resume(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """A limit on the file size truncates the line; the resumed run has no limit."""
    code = f"""
import resource, signal, sys
from pathlib import Path
from tests.training.training_runs import config_of
from transcriptformer.errors import OutputError
from transcriptformer.training.run import fit
folder = Path({str(tmp_path / "run")!r})
def on_step(n_done, n_steps, loss):
    if n_done == 7:
        room = (folder / "metrics.csv").stat().st_size + 20
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
try:
    fit(config_of(folder, Path({str(uninterrupted / "cells.h5ad")!r}), **{SETTINGS}), on_step)
except OutputError as error:
    sys.exit(f"refused: {{error}}")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert "metrics.csv: cannot be written (File too large)" in done.stderr, done.stderr
    assert not (tmp_path / "run" / "metrics.csv").read_bytes().endswith(b"\n")
    fit(config_of(tmp_path / "run", uninterrupted / "cells.h5ad", resume=True, **SETTINGS))
    assert_same_run(tmp_path / "run", uninterrupted / "run")


def test_an_incomplete_line_is_ignored(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.begin()
    for step in (1, 2):
        metrics.append(step, {"loss": 2.5, "validation_label_accuracy": 0.625})
    complete = metrics.path.read_bytes()
    assert [row["validation_label_accuracy"] for row in read_metrics(metrics.path)] == ["0.625", "0.625"]
    second_line = complete.rindex(b"\r\n", 0, -2) + 2
    for end in range(second_line, len(complete)):
        metrics.path.write_bytes(complete[:end])
        (row,) = read_metrics(metrics.path)
        assert tuple(row) == COLUMNS
        assert row["step"] == "1"
