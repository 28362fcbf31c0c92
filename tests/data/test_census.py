"""Cells of a miniature census are downloaded as h5ad files ready for inference."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma
import tiledbsoma.io
from typer.testing import CliRunner, Result

from tests.commands import default_signals
from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import GENES, random_adata
from transcriptformer.cli.main import app
from transcriptformer.data import census as census_module

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

N_CELLS, N_GENES = 100, 60


def the_cells() -> anndata.AnnData:
    adata = random_adata(N_CELLS, n_genes=N_GENES)
    adata.obs["tissue_general"] = np.where(np.arange(N_CELLS) % 4 == 0, "lung", "liver")
    adata.obs["is_primary_data"] = np.arange(N_CELLS) % 2 == 0
    adata.var = pd.DataFrame({"feature_id": GENES[:N_GENES], "feature_name": [f"name{i}" for i in range(N_GENES)]})
    adata.var.index = adata.var.index.astype(str)
    return adata


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A local census with the layout of the public one."""
    uri = str(tmp_path_factory.mktemp("census") / "soma")
    census: tiledbsoma.Collection[Any]
    with tiledbsoma.Collection.create(uri) as census:
        with census.add_new_collection("census_data") as data:
            experiment = f"{uri}/census_data/homo_sapiens"
            tiledbsoma.io.from_anndata(experiment, the_cells(), "RNA", X_layer_name="raw", obs_id_name="cell")
            data.set("homo_sapiens", tiledbsoma.open(experiment), use_relative_uri=True)
        with census.add_new_collection("census_info") as info:
            summary = pa.table({"soma_joinid": [0], "label": ["census_build_date"], "value": ["2026-01-01"]})
            with info.add_new_dataframe(
                "summary", schema=summary.schema, index_column_names=["soma_joinid"], domain=[(0, 9)]
            ) as frame:
                frame.write(summary)
    return uri


def download(folder: Path, uri: str, *options: object) -> Result:
    fixed = ["download-data", "--source", "census", "--species", "Homo sapiens", "--output-dir", folder]
    return CliRunner().invoke(app, [str(part) for part in (*fixed, "--census-uri", uri, *options)])


def written(folder: Path) -> list[anndata.AnnData]:
    return [anndata.read_h5ad(path) for path in sorted(folder.glob("homo_sapiens/*.h5ad"))]


def assert_same_cells(files: list[anndata.AnnData], expected: anndata.AnnData) -> None:
    found = anndata.concat(files, merge="first")
    assert list(found.obs["cell"]) == list(expected.obs_names)
    assert list(found.var["ensembl_id"]) == list(expected.var["feature_id"])
    np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())
    assert list(found.obs["tissue_general"]) == list(expected.obs["tissue_general"])


def test_all_cells_are_split_into_files(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census_module, "CHUNK_CELLS", 7)
    result = download(tmp_path, uri, "--cells-per-file", 30)
    assert result.exit_code == 0, result.output
    files = written(tmp_path)
    assert [len(file) for file in files] == [30, 30, 30, 10]
    assert {file.X.format for file in files} == {"csr"}
    assert_same_cells(files, the_cells())
    assert result.stdout.startswith(f"{tmp_path}/homo_sapiens/homo_sapiens_00000.h5ad: 30 cells\n")


def test_filter_selects_cells(uri: str, tmp_path: Path) -> None:
    condition = "tissue_general == 'lung' and is_primary_data == True"
    assert download(tmp_path, uri, "--filter", condition).exit_code == 0
    cells = the_cells()
    chosen = (cells.obs["tissue_general"] == "lung") & cells.obs["is_primary_data"]
    assert_same_cells(written(tmp_path), cells[chosen.to_numpy()])


def test_files_are_ready_for_inference(uri: str, tmp_path: Path) -> None:
    download(tmp_path, uri, "--filter", "tissue_general == 'lung'")
    file = tmp_path / "homo_sapiens" / "homo_sapiens_00000.h5ad"
    options = ["inference", "--checkpoint-path", CHECKPOINT, "--data-file", file, "--output-path", tmp_path]
    result = CliRunner().invoke(app, [str(part) for part in (*options, "--precision", "32", "--device", "cpu")])
    assert result.exit_code == 0, result.output
    assert "60 of 60 genes are in the vocabulary" in result.stderr


def test_interrupted_run_is_continued(uri: str, tmp_path: Path) -> None:
    download(tmp_path, uri, "--cells-per-file", 30)
    folder = tmp_path / "homo_sapiens"
    (folder / "homo_sapiens_00001.h5ad").unlink()
    (folder / ".homo_sapiens_00001.h5ad.tmp").write_text("killed")
    result = download(tmp_path, uri, "--cells-per-file", 30)
    assert result.exit_code == 0
    assert result.stdout.count("already present") == 3
    assert_same_cells(written(tmp_path), the_cells())
    assert not list(tmp_path.rglob("*.tmp"))


def test_signal_ends_a_slow_request(uri: str, tmp_path: Path) -> None:
    code = f"""
import sys, time, cellxgene_census
from pathlib import Path
from transcriptformer.data import census
def stall(*unused, **options):
    print("stalled", flush=True)
    time.sleep(60)
cellxgene_census.get_anndata = stall
with census.open_census({uri!r}, "stable") as found:
    list(census.download_cells(found, "homo sapiens", Path({str(tmp_path)!r})))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stalled\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert list(tmp_path.rglob("*.h5ad")) == []


def test_selections_are_not_mixed(uri: str, tmp_path: Path) -> None:
    download(tmp_path, uri)
    result = download(tmp_path, uri, "--filter", "tissue_general == 'lung'")
    assert result.exit_code == 2
    assert "contains cells of another selection (filter was '', is now \"tissue_general == 'lung'\")" in result.stderr
    assert len(written(tmp_path)) == 1


def test_unreadable_selection_record_is_a_one_line_error(uri: str, tmp_path: Path) -> None:
    (tmp_path / "homo_sapiens").mkdir()
    (tmp_path / "homo_sapiens" / "census_selection.json").write_text("{")
    result = download(tmp_path, uri)
    assert result.exit_code == 2
    assert "census_selection.json: cannot be read" in result.stderr


def test_unknown_species_is_an_error_before_any_download(uri: str, tmp_path: Path) -> None:
    result = download(tmp_path, uri, "--species", "homo sapiens,pan troglodytes")
    assert result.exit_code == 1
    assert not list(tmp_path.rglob("*.h5ad"))


def test_dry_run_only_counts(uri: str, tmp_path: Path) -> None:
    result = download(tmp_path / "new", uri, "--dry-run", "--cells-per-file", 30)
    assert result.stdout == "Homo sapiens: 100 cells, 4 files\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--species", "pan troglodytes"], "'pan troglodytes': not in this census; available: homo_sapiens"),
        (["--filter", "tissue_general == 'brain'"], "no cell of Homo sapiens matches"),
        (["--filter", "no_such_column == 1"], "cells cannot be selected"),
        (["--filter", "= ="], "cells cannot be selected"),
        (["--census-uri", "/no/such/census"], "census /no/such/census: cannot be opened"),
    ],
)
def test_invalid_selection_is_a_one_line_error(options: list[str], reason: str, uri: str, tmp_path: Path) -> None:
    result = download(tmp_path / "new", uri, *options)
    assert result.exit_code == 1
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list((tmp_path / "new").rglob("*.h5ad*"))
