"""Training runs: their output, reproducibility, resumption and errors."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from tests.commands import COMMAND, finish, start
from tests.training.training_runs import GENE_FILE, SMALL, assert_same_run, config_of, losses, weights, write_cells
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.errors import CheckpointError, DataError, TrainingError, UsageError
from transcriptformer.inference.run import embed
from transcriptformer.training.metrics import read_metrics
from transcriptformer.training.run import fit

NO_DROPOUT: dict[str, Any] = {"model__model_config__dropout": 0.0}

ALL_HAVE_GRADIENTS: dict[str, Any] = {"model__model_config__mu_link_fn": "softplus"}
"""A softmax is invariant to a shift of all genes, so rounding errors would move the weights behind that shift."""

REFERENCE = os.environ.get("TRANSCRIPTFORMER_REFERENCE_PYTHON")


class InterruptedRunError(Exception):
    """Raised to interrupt a run."""


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    return write_cells(tmp_path / "cells.h5ad")


def interrupt_at(step: int) -> Any:
    def on_step(n_done: int, n_steps: int, loss: float) -> None:
        if n_done == step:
            raise InterruptedRunError

    return on_step


def train_command(folder: Path, *files: Path, **settings: object) -> list[str]:
    options = [part for file in files for part in ("--data-file", str(file))]
    overrides = {**SMALL, **{name.replace("__", "."): value for name, value in settings.items()}}
    options += [part for key, value in overrides.items() for part in ("--config-override", f"{key}={value}")]
    fixed = [str(COMMAND), "train", "--protein-embedding", str(GENE_FILE), "--output-path", str(folder)]
    return [*fixed, *options]


def test_the_output_is_a_checkpoint_the_metrics_a_plot_and_the_configuration(cells: Path, tmp_path: Path) -> None:
    trained = fit(config_of(tmp_path / "run", cells))
    assert trained is not None
    assert trained.checkpoint == tmp_path / "run" / "checkpoint"
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        *("checkpoint", "state", "metrics.csv", "loss.png", "config.yaml")
    }
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(1, 11))  # 36 cells, 8 at a time, twice
    assert [int(row["step"]) for row in rows if row["validation_loss"]] == [5, 10]
    best = min(float(row["validation_loss"]) for row in rows if row["validation_loss"])
    assert trained.validation["validation_loss"] == best


def test_a_trained_checkpoint_embeds_cells(cells: Path, tmp_path: Path) -> None:
    trained = fit(config_of(tmp_path / "run", cells))
    assert trained is not None
    config = load_config(trained.checkpoint, {"model.inference_config.precision": "32"})
    result = embed([cells], load_checkpoint(trained.checkpoint, config))
    assert result.obsm["embeddings"].shape == (40, 16)
    assert np.isfinite(result.obsm["embeddings"]).all()


@pytest.mark.skipif(REFERENCE is None, reason="TRANSCRIPTFORMER_REFERENCE_PYTHON names no interpreter")
def test_the_published_package_gives_the_same_embeddings_with_a_trained_checkpoint(tmp_path: Path) -> None:
    cells = write_cells(tmp_path / "cells.h5ad")
    config = config_of(tmp_path / "run", cells, model__model_config__seq_len=127)
    trained = fit(config)
    assert trained is not None
    options = {"model.inference_config.precision": "32", "model.inference_config.device": "cpu"}
    ours = embed([cells], load_checkpoint(trained.checkpoint, load_config(trained.checkpoint, options)))
    assert REFERENCE is not None
    command = Path(REFERENCE).with_name("transcriptformer")
    fixed: list[str | Path] = [
        "inference",
        "--checkpoint-path",
        trained.checkpoint,
        "--data-file",
        cells,
        "--precision",
        "32",
    ]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [command, *fixed, "--output-path", tmp_path / "theirs"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs = anndata.read_h5ad(tmp_path / "theirs" / "embeddings.h5ad")
    np.testing.assert_allclose(theirs.obsm["embeddings"], ours.obsm["embeddings"], rtol=1e-4, atol=1e-6)


def test_weights_depend_on_the_seed_only(cells: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(config_of(tmp_path / name, cells, seed=seed))
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["gene_id_head.layers.0.weight"], c["gene_id_head.layers.0.weight"])


def test_the_batch_size_does_not_change_a_step(cells: Path, tmp_path: Path) -> None:
    """Gradients are accumulated over genes: a step of one batch equals one of many."""
    for name, tokens in (("one", 10_000), ("many", 40)):
        fit(config_of(tmp_path / name, cells, tokens_per_batch=tokens, **NO_DROPOUT, **ALL_HAVE_GRADIENTS))
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=1e-4)


def test_workers_do_not_change_the_losses(cells: Path, tmp_path: Path) -> None:
    for name, n_workers in (("none", 0), ("two", 2)):
        fit(config_of(tmp_path / name, cells, model__data_config__n_data_workers=n_workers, **NO_DROPOUT))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "none"), rtol=1e-4)


@pytest.mark.parametrize("interrupted_at", [6, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 10))])
def test_a_resumed_run_equals_an_uninterrupted_one(cells: Path, tmp_path: Path, interrupted_at: int) -> None:
    """With dropout; interrupted in the middle of an epoch and at its end."""
    settings: dict[str, Any] = {"save_every": 2}
    fit(config_of(tmp_path / "uninterrupted", cells, **settings))
    with pytest.raises(InterruptedRunError):
        fit(config_of(tmp_path / "interrupted", cells, **settings), interrupt_at(interrupted_at))
    fit(config_of(tmp_path / "interrupted", cells, resume=True, **settings))
    assert_same_run(tmp_path / "interrupted", tmp_path / "uninterrupted")


@pytest.mark.slow
@pytest.mark.parametrize("interrupted_at", [11, 15, 21])
def test_a_resumed_run_stops_as_early_as_an_uninterrupted_one(cells: Path, tmp_path: Path, interrupted_at: int) -> None:
    settings: dict[str, Any] = {"max_epochs": 20, "patience": 2, "learning_rate": 0.03, "save_every": 2}
    fit(config_of(tmp_path / "uninterrupted", cells, **settings))
    assert 20 < losses(tmp_path / "uninterrupted")[-1][0] < 100
    with pytest.raises(InterruptedRunError):
        fit(config_of(tmp_path / "interrupted", cells, **settings), interrupt_at(interrupted_at))
    fit(config_of(tmp_path / "interrupted", cells, resume=True, **settings))
    assert_same_run(tmp_path / "interrupted", tmp_path / "uninterrupted")


def test_resuming_with_more_workers_than_streams_is_refused(cells: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        fit(config_of(tmp_path / "run", cells, save_every=1), interrupt_at(3))
    with pytest.raises(UsageError, match=r"changed: .*streams was 4, is 6"):
        fit(config_of(tmp_path / "run", cells, resume=True, model__data_config__n_data_workers=6))


def test_a_run_whose_input_was_refused_can_start_over(cells: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        fit(config_of(tmp_path / "run", cells, model__data_config__min_expressed_genes=1000))
    with pytest.raises(DataError):
        fit(config_of(tmp_path / "run", cells, model__data_config__gene_col_name="index"))
    assert fit(config_of(tmp_path / "run", cells)) is not None


def test_a_damaged_state_is_an_error(cells: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        fit(config_of(tmp_path / "run", cells, save_every=1), interrupt_at(3))
    (tmp_path / "run" / "state" / "last.ckpt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"last\.ckpt: truncated or damaged"):
        fit(config_of(tmp_path / "run", cells, resume=True, save_every=1))


@pytest.mark.parametrize("n_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_the_state_and_ends_all_processes(cells: Path, tmp_path: Path, n_processes: int) -> None:
    settings = {"training__max_epochs": 400, "training__save_every": 10_000}
    command = [*train_command(tmp_path / "run", cells, **settings), "--num-gpus", str(n_processes)]
    process = start(command)
    metrics = tmp_path / "run" / "metrics.csv"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert (tmp_path / "run" / "state" / "last.ckpt").exists()
    assert "Traceback" not in err


def test_a_finished_run_is_not_repeated(cells: Path, tmp_path: Path) -> None:
    first = fit(config_of(tmp_path / "run", cells))
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    assert fit(config_of(tmp_path / "run", cells, resume=True)) == first
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


def test_changed_settings_are_not_resumed_and_an_earlier_run_is_not_overwritten(cells: Path, tmp_path: Path) -> None:
    fit(config_of(tmp_path / "run", cells))
    with pytest.raises(UsageError, match="holds an earlier run; add --resume"):
        fit(config_of(tmp_path / "run", cells))
    with pytest.raises(UsageError, match=r"changed: settings\.training\.learning_rate was 0\.003, is 0\.1"):
        fit(config_of(tmp_path / "run", cells, resume=True, learning_rate=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["cells", "genes"])
def test_changed_input_of_the_same_size_and_date_is_not_resumed(changed: str, cells: Path, tmp_path: Path) -> None:
    genes = Path(shutil.copy(GENE_FILE, tmp_path / "genes.h5"))
    settings: dict[str, Any] = {"training__protein_embeddings": [str(genes)]}
    with pytest.raises(InterruptedRunError):
        fit(config_of(tmp_path / "run", cells, save_every=1, **settings), interrupt_at(3))
    path, key = (cells, "X/data") if changed == "cells" else (genes, "arrays")
    status = path.stat()
    with h5py.File(path, "r+") as file:
        values = file[key] if changed == "cells" else next(iter(file[key].values()))
        values[0] += 1
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    with pytest.raises(UsageError, match=r"contains a different run; changed: (cells|start)\.0\.content was"):
        fit(config_of(tmp_path / "run", cells, save_every=1, resume=True, **settings))


def test_two_processes_equal_one_with_the_same_cells_per_step(cells: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model__model_config__dropout": 0,
        "training__tokens_per_batch": 80,
    }
    settings |= ALL_HAVE_GRADIENTS
    done = finish(start([*train_command(tmp_path / "two", cells, **settings), "--num-gpus", "2"]))
    assert done.returncode == 0, done.stderr
    fit(config_of(tmp_path / "one", cells, **settings))
    assert len(losses(tmp_path / "one")) == 12  # 10 steps and 2 validations
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_and_resumed_equals_an_uninterrupted_one(cells: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training__save_every": 3, "training__max_epochs": 30, **ALL_HAVE_GRADIENTS}
    command = train_command(tmp_path / "killed", cells, **settings)
    fit(config_of(tmp_path / "uninterrupted", cells, **settings))
    rng = random.Random(0)
    for attempt in range(5):
        metrics = tmp_path / "killed" / "metrics.csv"
        process = start(command if attempt == 0 else [*command, "--resume"])
        before = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= before):
            time.sleep(0.05)
        finish(process, kill_after=rng.random() * 2)
    done = finish(start([*command, "--resume"]))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "killed", tmp_path / "uninterrupted")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(cells: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", cells, learning_rate=1e30, clip_gradients=0, warmup_share=0, save_every=1)
    with pytest.raises(TrainingError, match=r"step \d+: the loss is not finite in a batch of \d+ cells: 'c\d+' \("):
        fit(config)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_validation_loss_that_is_not_finite_stops_the_run(cells: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", cells, learning_rate=1e30, clip_gradients=0, warmup_share=0, max_steps=1)
    with pytest.raises(TrainingError, match="step 1: the validation loss is not finite"):
        fit(config)


def test_data_weights_are_passes_over_each_file(tmp_path: Path) -> None:
    first, second = (write_cells(tmp_path / f"{i}.h5ad", 40, seed=i) for i in range(2))
    config = config_of(tmp_path / "run", first, second, data_weights=[0.5, 2.0], validation_fraction=0.0, max_epochs=2)
    trained = fit(config)
    assert trained is not None
    assert trained.validation == {}
    assert trained.n_steps == 2 * 13  # (20 + 80) cells per epoch, 8 at a time


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_there_is_a_baseline_only_with_validation(
    fraction: float, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[float] = []
    monkeypatch.setattr(Axes, "axhline", lambda axes, y, **style: lines.append(y))
    trained = fit(config_of(tmp_path / "run", cells, validation_fraction=fraction, max_steps=1))
    assert trained is not None
    assert lines == ([trained.baseline] if fraction else [])
    assert ("frequency baseline" in trained.describe()) == (fraction > 0)
    assert (trained.baseline is None) == (trained.baseline_parts is None) == (fraction == 0)


def test_validation_files_are_held_out(cells: Path, tmp_path: Path) -> None:
    other = write_cells(tmp_path / "other.h5ad", 8, seed=5)
    fit(config_of(tmp_path / "run", cells, validation_files=[str(other)]))
    assert len([row for row in read_metrics(tmp_path / "run" / "metrics.csv") if row["loss"]]) == 10  # all 40 cells


def test_a_file_that_is_named_twice_is_refused(cells: Path, tmp_path: Path) -> None:
    """By whatever path, or its held-out cells would also be learned."""
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link.h5ad"
    link.symlink_to(cells)
    detour = tmp_path / "folder" / ".." / "cells.h5ad"
    for other in (cells, detour, link):
        with pytest.raises(UsageError, match="the same file as --data-file"):
            fit(config_of(tmp_path / "run", cells, validation_files=[str(other)]))
        with pytest.raises(UsageError, match="the same file as --data-file"):
            fit(config_of(tmp_path / "run", cells, other))


def test_gradients_that_are_not_finite_stop_the_run_before_the_weights_change(
    cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *unused: torch.tensor(torch.inf))
    with pytest.raises(TrainingError, match="step 1: the gradients are not finite"):
        fit(config_of(tmp_path / "run", cells, save_every=1))
    assert not (tmp_path / "run" / "state" / "last.ckpt").exists()


def test_a_vocabulary_that_changes_during_the_run_is_not_written(cells: Path, tmp_path: Path) -> None:
    gene_file = tmp_path / "gene.h5"
    shutil.copy(GENE_FILE, gene_file)
    config = config_of(tmp_path / "run", cells, protein_embeddings=[str(gene_file)])
    original = gene_file.read_bytes()

    def change(n_done: int, n_steps: int, loss: float) -> None:
        gene_file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))

    with pytest.raises(TrainingError, match="has changed since its start; restore it"):
        fit(config, change)
    assert not (tmp_path / "run" / "checkpoint").exists()
    gene_file.write_bytes(original)
    config.training.resume = True
    assert fit(config) is not None


def test_early_stopping_ends_a_run_that_does_not_improve(cells: Path, tmp_path: Path) -> None:
    trained = fit(config_of(tmp_path / "run", cells, max_epochs=20, patience=2, learning_rate=0.3))
    assert trained is not None
    steps = [int(row["step"]) for row in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert steps[-1] == trained.n_steps + 2 * 5 < 100


def test_the_checkpoint_has_the_weights_of_the_best_validation(cells: Path, tmp_path: Path) -> None:
    trained = fit(config_of(tmp_path / "run", cells, max_epochs=6, learning_rate=0.1))
    assert trained is not None
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.csv") if row["validation_loss"]]
    best = min(rows, key=lambda row: float(row["validation_loss"]))
    assert trained.n_steps == int(best["step"])


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_state(cells: Path, tmp_path: Path) -> None:
    """A limit on the file size simulates a full disk, which PyTorch hits while it writes."""
    code = f"""
import resource, signal, sys
from pathlib import Path
from tests.training.training_runs import config_of
from transcriptformer.errors import CheckpointError, DataError, OutputError
from transcriptformer.training.run import fit
folder = Path({str(tmp_path / "run")!r})
def on_step(n_done, n_steps, loss):
    if n_done == 7:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    fit(config_of(folder, Path({str(cells)!r}), save_every=2, **{ALL_HAVE_GRADIENTS}), on_step)
except OutputError as error:
    sys.exit(f"refused: {{error}}")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert "refused" in done.stderr, done.stderr
    assert "still holds the state of an earlier step; free disk space, then rerun with --resume" in done.stderr
    assert {path.name for path in (tmp_path / "run" / "state").glob("*ckpt*")} == {"last.ckpt", "best.ckpt"}
    fit(config_of(tmp_path / "run", cells, save_every=2, resume=True, **ALL_HAVE_GRADIENTS))
    fit(config_of(tmp_path / "uninterrupted", cells, save_every=2, **ALL_HAVE_GRADIENTS))
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")
