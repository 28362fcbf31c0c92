"""The command as people type it: what works, and what each kind of bad input is answered with."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner, Result

from tests.commands import default_signals
from tests.golden_cases import CELLS, CHECKPOINT, TOLERANCE, GoldenCase, real_cases, relative_error, synthetic_cases
from tests.h5ad_files import GENES, make_adata, random_adata
from transcriptformer.cli.main import app

COMMAND = Path(sys.executable).with_name("transcriptformer")


def invoke(*arguments: object, checkpoint: Path = CHECKPOINT) -> Result:
    fixed = ["inference", "--checkpoint-path", checkpoint, "--precision", "32", "--device", "cpu"]
    return CliRunner().invoke(app, [str(argument) for argument in [*fixed, *arguments]])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in which results go to ./inference_results."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_refused(result: Result, exit_code: int, message: str, folder: Path) -> None:
    """One clear line, that exit code, no traceback, no output file."""
    assert result.exit_code == exit_code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert result.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not list(folder.rglob("*embeddings.h5ad*"))


def test_a_result_is_written_and_named_on_the_last_line(folder: Path) -> None:
    result = invoke("--data-file", CELLS)
    assert result.exit_code == 0, result.output
    assert result.stdout == "24 cells: obsm['embeddings'] (24, 32) in inference_results/embeddings.h5ad\n"
    assert anndata.read_h5ad("inference_results/embeddings.h5ad").n_obs == 24
    assert [path.name for path in Path("inference_results").iterdir()] == ["embeddings.h5ad"]


def test_what_is_unusual_about_the_cells_is_told(folder: Path) -> None:
    told = invoke("--data-file", CELLS).stderr
    assert "24 cells" in told
    assert "1 without genes in the vocabulary" in told
    assert "3 truncated to 127 genes (15.9 % of all counts dropped)" in told
    assert re.search(r"\d+ with unknown assay", told)


def test_every_option_reaches_the_configuration(folder: Path) -> None:
    adata = anndata.read_h5ad(CELLS)
    adata.var = pd.DataFrame(index=pd.Index(adata.var["ensembl_id"], name="gene"))
    adata.write_h5ad(folder / "by_index.h5ad")
    result = invoke(
        *("--data-file", "by_index.h5ad", "--output-path", "there", "--output-filename", "x.h5ad", "--batch-size", 3),
        *("--gene-col-name", "index", "--precision", "bf16-mixed", "--clip-counts", 5, "--use-raw", "False"),
        *("--no-filter-to-vocabs", "--embedding-layer-index", 0, "--model-type", "transcriptformer"),
        *("--emb-type", "cell", "--remove-duplicate-genes", "--device", "cpu", "--num-gpus", 1),
        *("--n-data-workers", 1, "--config-override", "model.inference_config.output_keys=[embeddings,llh]"),
        *("--config-override", "model.inference_config.obs_keys.0=donor"),
    )
    assert result.exit_code == 0, result.output
    written = anndata.read_h5ad("there/x.h5ad")
    assert list(written.obs.columns) == ["donor"]
    assert "llh" in written.uns
    model = json.loads(written.uns["transcriptformer"]["config"])["model"]
    inference, data = model["inference_config"], model["data_config"]
    assert (inference["batch_size"], inference["precision"], inference["embedding_layer_index"]) == (3, "bf16-mixed", 0)
    assert (data["clip_counts"], data["use_raw"], data["filter_to_vocabs"]) == (5, False, False)
    assert (data["remove_duplicate_genes"], data["n_data_workers"]) == (True, 1)


def test_several_files_make_one_result_in_their_order(folder: Path) -> None:
    for i, n_cells in enumerate((3, 2)):
        part = random_adata(n_cells, seed=i)
        part.obs_names = [f"file{i}-{name}" for name in part.obs_names]
        part.write_h5ad(folder / f"{i}.h5ad")
    assert invoke("--data-file", "0.h5ad", "--data-file", "1.h5ad").exit_code == 0
    written = anndata.read_h5ad("inference_results/embeddings.h5ad")
    assert list(written.obs_names) == ["file0-c0", "file0-c1", "file0-c2", "file1-c0", "file1-c1"]


def test_raw_counts_are_used_by_default(folder: Path) -> None:
    adata = random_adata(4)
    adata.write_h5ad(folder / "counts.h5ad")
    adata.raw = adata.copy()
    adata.X = np.log1p(adata.X)
    adata.write_h5ad(folder / "with_raw.h5ad")
    embeddings = {}
    for name in ("counts", "with_raw"):
        assert invoke("--data-file", f"{name}.h5ad", "--output-filename", f"{name}.out.h5ad").exit_code == 0
        embeddings[name] = anndata.read_h5ad(f"inference_results/{name}.out.h5ad").obsm["embeddings"]
    np.testing.assert_array_equal(embeddings["counts"], embeddings["with_raw"])


@pytest.mark.parametrize(
    "case",
    [*synthetic_cases("cell"), *(pytest.param(case, marks=pytest.mark.slow) for case in real_cases("cell"))],
    ids=str,
)
def test_the_shell_command_equals_the_reference(case: GoldenCase, tmp_path: Path) -> None:
    command: list[str | Path] = [COMMAND, "inference", "--checkpoint-path", case.checkpoint, "--data-file", case.data]
    options: list[str | Path] = ["--precision", "32", "--device", "cpu", "--output-path", tmp_path]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    written, source = anndata.read_h5ad(tmp_path / "embeddings.h5ad"), anndata.read_h5ad(case.data)
    assert relative_error(written.obsm["embeddings"], case.expected["embeddings"]) < TOLERANCE
    pd.testing.assert_frame_equal(written.obs, source.obs)


def no_h5ad(path: Path) -> None:
    path.write_text("cell,gene\n")


def no_anndata(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["matrix"] = np.ones(3)


def truncated(path: Path) -> None:
    shutil.copy(CELLS, path)
    with path.open("r+b") as file:
        file.truncate(CELLS.stat().st_size // 2)


def damaged_inside(path: Path) -> None:
    random_adata(5).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["X/indices"]


def without_gene_ids(path: Path) -> None:
    adata = make_adata([[1, 2]])
    adata.var = adata.var.rename(columns={"ensembl_id": "feature_id"}).assign(symbol=["TP53", "BRCA1"])
    adata.write_h5ad(path)


def without_genes(path: Path) -> None:
    make_adata(np.zeros((3, 0))).write_h5ad(path)


def gene_ids_in_the_index(path: Path) -> None:
    adata = make_adata([[1, 2]])
    adata.var = pd.DataFrame({"symbol": ["TP53", "BRCA1"]}, index=GENES[:2])
    adata.write_h5ad(path)


def with_genes(*genes: str) -> Callable[[Path], None]:
    return lambda path: make_adata([[1] * len(genes)], genes=list(genes)).write_h5ad(path)


def with_count(count: float) -> Callable[[Path], None]:
    return lambda path: make_adata([[1, count]]).write_h5ad(path)


def no_cells(path: Path) -> None:
    make_adata(np.zeros((0, 3))).write_h5ad(path)


@pytest.mark.parametrize(
    ("make", "options", "exit_code", "message"),
    [
        pytest.param(lambda path: None, [], 2, r"--data-file cells\.h5ad: no such file", id="file missing"),
        pytest.param(no_h5ad, [], 1, r"cells\.h5ad: not an HDF5 file", id="not HDF5"),
        pytest.param(no_anndata, [], 1, r"cells\.h5ad: not an AnnData .*'obs' and 'var'", id="not AnnData"),
        pytest.param(truncated, [], 1, r"cells\.h5ad: cannot be read: truncated or damaged", id="truncated"),
        pytest.param(damaged_inside, [], 1, r"cells\.h5ad: cannot be read: truncated or damaged", id="damaged inside"),
        pytest.param(with_genes("TP53", "BRCA1"), [], 1, "none of its 2 genes.*gene symbols", id="symbols"),
        pytest.param(
            with_genes("ENSMUSG00000024798", "ENSMUSG00000042385"),
            [],
            1,
            "none of its 2 genes.*another species",
            id="no gene in the vocabulary",
        ),
        pytest.param(lambda path: path.mkdir(), [], 2, r"cells\.h5ad: is a folder", id="a folder"),
        pytest.param(with_genes(f"{GENES[0]}.1", f"{GENES[0]}.2"), [], 1, "duplicate gene ids", id="duplicate genes"),
        pytest.param(with_count(-1), [], 1, "counts are negative, first in cell 'c0'", id="negative"),
        pytest.param(with_count(np.nan), [], 1, "counts are NaN or infinite", id="NaN"),
        pytest.param(with_count(np.inf), [], 1, "counts are NaN or infinite", id="infinite"),
        pytest.param(without_genes, [], 1, "contains no genes", id="no genes"),
        pytest.param(no_cells, [], 1, "contains no cells", id="no cells"),
        pytest.param(
            with_count(2),
            ["--config-override", "model.data_config.min_expressed_genes=3"],
            1,
            "the filters removed all 1 cells",
            id="no cells left",
        ),
        pytest.param(with_count(2), ["--use-raw", "true"], 1, "has no .raw", id="no raw"),
        pytest.param(
            with_count(2),
            ["--config-override", "model.inference_config.obs_keys=[cell_type]"],
            1,
            "obs has no column 'cell_type'; its columns are: assay",
            id="obs column missing",
        ),
    ],
)
def test_bad_data_is_refused(
    make: Callable[[Path], None], options: list[str], exit_code: int, message: str, folder: Path
) -> None:
    make(folder / "cells.h5ad")
    assert_refused(invoke("--data-file", "cells.h5ad", *options), exit_code, message, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], r"batch_size \(--batch-size\): must be at least 1, or auto, not 0"),
        (["--config-override", "model.data_config.clip_count=3"], "model.data_config.clip_count: no such"),
        (["--config-override", "model.data_config.clip_counts=many"], "model.data_config.clip_counts: Value 'many'"),
        (["--precision", "64"], "--precision"),
        (["--batch-size", "many"], r"batch_size \(--batch-size\): must be at least 1, or auto, not many"),
        (["--output-filename", "result.csv"], "--output-filename"),
        (["--num-gpus", "0"], "--num-gpus"),
        (["--num-nodes", "0"], "--num-nodes"),
        (["--cge-pool", "gene"], "--cge-pool.*requires --emb-type cge"),
        (
            ["--config-override", "model.inference_config.reference_stale_indices=true"],
            "requires --pretrained-embedding",
        ),
        (
            ["--model-type", "esm2ce", "--config-override", "model.inference_config.output_keys=[llh]"],
            "must be \\[embeddings\\] for esm2ce",
        ),
        (["--data-file", "gopher://somewhere/cells.zarr"], "cannot be read as a zarr store"),
        (["--output-path", "a file"], "--output-path a file: embeddings.h5ad cannot be written there"),
        (["--output-filename", "x" * 250 + ".h5ad"], "--output-path .*cannot be written there"),
        (["--data-file", "x" * 300], "no such file"),
        (["--embedding-layer-index", "9"], "--embedding-layer-index"),
        (["--checkpoint-path", "nowhere"], "--checkpoint-path nowhere: no such folder"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: not available",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused(options: list[str], message: str, folder: Path) -> None:
    (folder / "a file").touch()
    assert_refused(invoke("--data-file", CELLS, *options), 2, message, folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(folder: Path) -> None:
    (folder / "read-only").mkdir(mode=0o555)
    result = invoke("--data-file", CELLS, "--output-path", "read-only")
    assert_refused(result, 2, "--output-path read-only: embeddings.h5ad cannot be written there", folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), r"config\.json: missing"),
        (lambda path: (path / "config.json").write_text("not JSON"), r"config\.json: cannot be parsed as JSON"),
        (lambda path: (path / "config.json").write_text('{"model": {}}'), "the key 'model.model_config' is missing"),
        (lambda path: (path / "model_weights.pt").unlink(), r"model_weights\.pt: missing"),
        (lambda path: (path / "model_weights.pt").write_bytes(b"PK"), r"model_weights\.pt: truncated"),
        (lambda path: torch.save({"a": torch.ones(1)}, path / "model_weights.pt"), "embedding.weight is missing"),
        (lambda path: (path / "vocabs" / "homo_sapiens_gene.h5").unlink(), "vocabulary file missing"),
    ],
)
def test_bad_checkpoints_are_refused(
    damage: Callable[[Path], object], message: str, checkpoint_copy: Path, folder: Path
) -> None:
    damage(checkpoint_copy)
    assert_refused(invoke("--data-file", CELLS, checkpoint=checkpoint_copy), 1, message, folder)


@pytest.mark.parametrize(
    ("make", "warning"),
    [
        (with_count(1.5), "WARNING: cells.h5ad: counts are not integers"),
        (with_genes(GENES[0], *(f"ENSG9999{i:07}" for i in range(20))), "WARNING: cells.h5ad: only 1 of 21 genes"),
    ],
)
def test_doubtful_data_is_a_warning(make: Callable[[Path], None], warning: str, folder: Path) -> None:
    make(folder / "cells.h5ad")
    result = invoke("--data-file", "cells.h5ad")
    assert result.exit_code == 0
    assert warning in result.stderr


def test_an_input_is_not_overwritten(folder: Path) -> None:
    random_adata(3).write_h5ad(folder / "cells.h5ad")
    before = (folder / "cells.h5ad").read_bytes()
    result = invoke("--data-file", "cells.h5ad", "--output-path", ".", "--output-filename", "cells.h5ad")
    assert_refused(result, 2, "cells.h5ad: is also an input", folder)
    assert (folder / "cells.h5ad").read_bytes() == before


def limit_size_of_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_is_one_line_and_what_is_computed_is_kept(folder: Path) -> None:
    command: list[str | Path] = [COMMAND, "inference", "--checkpoint-path", CHECKPOINT, "--data-file", CELLS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit_size_of_files)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.fullmatch(
        r"ERROR: inference_results/embeddings\.h5ad: cannot be written .*", done.stderr.splitlines()[-1]
    )
    assert [path.name for path in (folder / "inference_results").iterdir()] == ["embeddings.h5ad.parts"]

    without_option = invoke("--data-file", CELLS, "--precision", "16-mixed")
    assert_refused(without_option, 2, r"embeddings\.h5ad\.parts: contains results.*add --resume", folder / "nothing")
    again = invoke("--data-file", CELLS, "--precision", "16-mixed", "--resume")
    assert "24 cells are already done" in again.stderr
    assert [path.name for path in (folder / "inference_results").iterdir()] == ["embeddings.h5ad"]


def test_a_scheduler_that_started_several_tasks_does_not_confuse_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "embed")
    assert invoke("--data-file", CELLS).exit_code == 0


def test_debug_shows_the_traceback(folder: Path) -> None:
    command: list[str | Path] = [COMMAND, "inference", "--checkpoint-path", "nowhere", "--data-file", CELLS, "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "no such folder" in done.stderr


@pytest.mark.parametrize("make", [without_gene_ids, gene_ids_in_the_index])
def test_gene_ids_are_found_wherever_they_are(make: Callable[[Path], None], folder: Path) -> None:
    make(folder / "cells.h5ad")
    done = invoke("--data-file", "cells.h5ad")
    assert done.exit_code == 0, done.output
    assert "2 of 2 genes are in the vocabulary" in done.stderr


@pytest.mark.parametrize(
    ("sent", "exit_code", "how"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "ended by SIGTERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, "ended by SIGHUP", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_or_a_scheduler_ends_the_run_and_what_there_is_is_kept(
    sent: signal.Signals, exit_code: int, how: str, folder: Path
) -> None:
    random_adata(5_000).write_h5ad(folder / "cells.h5ad")
    command: list[str | Path] = [COMMAND, "inference", "--checkpoint-path", CHECKPOINT, "--data-file", "cells.h5ad"]
    with subprocess.Popen(
        [*command, "--batch-size", "1"], stderr=subprocess.PIPE, text=True, preexec_fn=default_signals
    ) as process:
        assert process.stderr is not None
        assert "5000 cells" in process.stderr.readline()
        assert "counts from .X; gene ids from var['ensembl_id']" in process.stderr.readline()
        time.sleep(1)
        process.send_signal(sent)
        rest = process.stderr.read()
    assert process.returncode == exit_code
    assert "Traceback" not in rest
    kept = re.fullmatch(
        rf"INFO: {how}; (\d+) of 5000 cells are kept in .*embeddings\.h5ad\.parts; .*--resume.*\n", rest
    )
    assert kept is not None
    assert 0 < int(kept[1]) < 5000
    assert [path.name for path in (folder / "inference_results").iterdir()] == ["embeddings.h5ad.parts"]


def test_an_unknown_option_is_a_usage_error(folder: Path) -> None:
    assert invoke("--data-file", CELLS, "--batchsize", 3).exit_code == 2
    assert CliRunner().invoke(app, ["inference"]).exit_code == 2


def test_version_is_that_of_the_package() -> None:
    assert re.fullmatch(r"transcriptformer \d+\.\d+\.\d+\S*\n", CliRunner().invoke(app, ["--version"]).output)
