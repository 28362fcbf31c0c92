"""`transcriptformer train` as people type it: what it says, and what each kind of bad input is answered with."""

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.commands import COMMAND, start
from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import make_adata
from tests.training.training_runs import GENE_FILE, write_cells, write_recipe
from transcriptformer.cli.main import app


def arguments(folder: Path, *options: object) -> list[str]:
    recipe = write_recipe(folder / "small.yaml")
    fixed = ["train", "--output-path", folder / "run", "--protein-embedding", GENE_FILE, "--config", recipe]
    return [str(part) for part in (*fixed, *options)]


def invoke(folder: Path, *options: object) -> Result:
    return CliRunner().invoke(app, arguments(folder, *options))


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    return write_cells(tmp_path / "cells.h5ad")


def assert_refused(result: Result, exit_code: int, message: str, folder: Path) -> None:
    """One clear line, that exit code, no traceback, no checkpoint."""
    assert result.exit_code == exit_code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 1, result.stderr
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in result.output
    assert not (folder / "run" / "checkpoint").exists()


def test_the_last_lines_tell_the_loss_beside_that_of_frequencies(cells: Path, tmp_path: Path) -> None:
    result = invoke(tmp_path, "--data-file", cells, "--max-epochs", 1)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))}/run/checkpoint: weights of step 5\n"
        r"validation loss \d+\.\d+ \(genes \d+\.\d+, counts \d+\.\d+\)\n"
        r"frequency baseline \d+\.\d+ \(genes \d+\.\d+, counts \d+\.\d+\)\n",
        result.stdout,
    )
    assert "36 training and 4 validation cells; 5 steps, 5 per epoch" in result.stderr
    assert re.search(r"[\d,]+ of [\d,]+ weights are trainable", result.stderr)


def test_every_option_reaches_the_configuration(tmp_path: Path) -> None:
    write_cells(tmp_path / "cells.h5ad", cell_type=np.array(["a", "b"])[np.arange(40) % 2], assay="newest")
    result = CliRunner().invoke(
        app,
        [
            *("train", "--data-file", str(tmp_path / "c*lls.h5ad"), "--checkpoint-path", str(CHECKPOINT)),
            *("--output-path", str(tmp_path / "run"), "--validation-fraction", "0.25", "--label-column", "cell_type"),
            *("--freeze", "mu", "--freeze", "gene_id_head", "--lora-rank", "2", "--new-assay", "newest=10x multiome"),
            *("--max-epochs", "3", "--max-steps", "2", "--patience", "4", "--batch-size", "10", "--use-raw", "false"),
            *("--learning-rate", "0.01", "--gene-col-name", "ensembl_id", "--remove-duplicate-genes", "--seed", "5"),
            *("--precision", "bf16-mixed", "--device", "cpu", "--num-gpus", "1", "--num-nodes", "1"),
            *("--n-data-workers", "1", "--config-override", "training.weight_decay=0.2"),
        ],
    )
    assert result.exit_code == 0, result.output
    text = (tmp_path / "run" / "config.yaml").read_text()
    for line in (
        *("validation_fraction: 0.25", "label_column: cell_type", "- gene_id_head", "lora_rank: 2"),
        *("newest: 10x multiome", "max_epochs: 3", "max_steps: 2", "patience: 4", "batch_size: 10", "use_raw: false"),
        *("learning_rate: 0.01", "remove_duplicate_genes: true", "seed: 5", "precision: bf16-mixed", "device: cpu"),
        *("n_data_workers: 1", "weight_decay: 0.2"),
    ):
        assert line in text, line


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        ((), 2, r"training\.data_files \(--data-file\): no training files"),
        (("--data-file", "nowhere.h5ad"), 2, r"--data-file nowhere\.h5ad: no such file"),
        (("--data-file", "nowhere/*.h5ad"), 2, r"--data-file nowhere/\*\.h5ad: no file matches"),
        (("--config", "nowhere.yaml"), 2, r"--config nowhere\.yaml: no such file"),
    ],
)
def test_files_that_are_not_there(tmp_path: Path, options: tuple[str, ...], exit_code: int, message: str) -> None:
    assert_refused(invoke(tmp_path, *options), exit_code, message, tmp_path)


def test_a_file_without_genes_of_the_vocabulary(tmp_path: Path) -> None:
    make_adata([[1, 2], [3, 4]], genes=["ENSMUSG00000000001", "ENSMUSG00000000002"]).write_h5ad(tmp_path / "mouse.h5ad")
    result = invoke(tmp_path, "--data-file", tmp_path / "mouse.h5ad")
    assert_refused(result, 1, r"mouse\.h5ad: none of its 2 genes is in the checkpoint's vocabulary", tmp_path)


def test_cells_of_which_none_has_a_gene(tmp_path: Path) -> None:
    make_adata(np.zeros((9, 5))).write_h5ad(tmp_path / "empty.h5ad")
    result = invoke(tmp_path, "--data-file", tmp_path / "empty.h5ad")
    assert_refused(result, 1, "no training cells: 0 of 9 cells pass the filters and express a known gene", tmp_path)


def test_a_missing_label_column(cells: Path, tmp_path: Path) -> None:
    result = invoke(tmp_path, "--data-file", cells, "--label-column", "cell_type")
    assert_refused(result, 1, r"--label-column cell_type: .*has no such obs column; it has: assay", tmp_path)


def test_a_loss_that_is_not_a_number(cells: Path, tmp_path: Path) -> None:
    options = ("--learning-rate", 1e30, "--config-override", "training.clip_gradients=0")
    assert_refused(
        invoke(tmp_path, "--data-file", cells, *options), 1, "the loss is not finite in a batch of", tmp_path
    )


def test_damage_in_one_of_several_files_is_found_before_anything_is_learned(cells: Path, tmp_path: Path) -> None:
    bad = make_adata([[1.0, 2.0], [3.0, -4.0]])
    bad.write_h5ad(tmp_path / "bad.h5ad")
    result = invoke(tmp_path, "--data-file", cells, "--data-file", tmp_path / "bad.h5ad")
    assert_refused(result, 1, r"bad\.h5ad: counts are negative, first in cell 'c1'", tmp_path)
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_an_output_that_cannot_be_written_to(cells: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    result = invoke(tmp_path, "--data-file", cells)
    assert_refused(result, 1, r"run: cannot be written", tmp_path)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(cells: Path, tmp_path: Path) -> None:
    process = start([str(COMMAND), *arguments(tmp_path, "--data-file", cells, "--max-epochs", 10_000)])
    metrics = tmp_path / "run" / "metrics.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("INFO: interrupted; ")
    assert err.splitlines()[-1].endswith("; rerun the same command with --resume to continue")
    assert "Traceback" not in err
