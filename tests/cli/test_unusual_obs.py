"""Files with unusual cell metadata or genome prefixes: embedded, or refused in one line before computing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from tests.golden_cases import CELLS, CHECKPOINT
from transcriptformer.cli.main import app

N = 24
Edit = Callable[[h5py.File], None]


def invoke(folder: Path, *files: str, obs_keys: str | None = None) -> Result:
    fixed = ["inference", "--checkpoint-path", str(CHECKPOINT), "--precision", "32", "--device", "cpu"]
    data = [option for file in files for option in ("--data-file", str(folder / file))]
    keys = [] if obs_keys is None else ["--config-override", f"model.inference_config.obs_keys=[{obs_keys}]"]
    return CliRunner().invoke(app, [*fixed, *data, *keys, "--output-path", str(folder / "out")])


def write(folder: Path, edit: Edit | None = None, name: str = "cells.h5ad", **columns: Any) -> None:
    adata = anndata.read_h5ad(CELLS)
    adata.obs["donor"] = pd.Categorical(adata.obs["donor"])
    adata.obs = adata.obs.assign(**columns)
    adata.write_h5ad(folder / name)
    if edit is not None:
        with h5py.File(folder / name, "r+") as file:
            edit(file)


def embeddings(folder: Path) -> np.ndarray:
    return np.asarray(anndata.read_h5ad(folder / "out" / "embeddings.h5ad").obsm["embeddings"])


def replaced(key: str, values: object) -> Edit:
    def edit(file: h5py.File) -> None:
        attributes = dict(file[key].attrs) if isinstance(file[key], h5py.Dataset) else {}
        del file[key]
        file[key] = values
        file[key].attrs.update(attributes)

    return edit


CODES, CATEGORIES = "obs/donor/codes", "obs/donor/categories"


@pytest.mark.parametrize(
    "edit",
    [
        replaced(CODES, np.full(N, 7, np.int8)),
        replaced(CODES, np.full(N, -3, np.int8)),
        replaced(CODES, np.zeros(5, np.int8)),
        replaced(CODES, np.zeros((N, 2), np.int8)),
        replaced(CODES, np.array([b"0"] * N)),
        replaced(CATEGORIES, np.array([[b"a", b"b"]] * 2)),
        replaced(CATEGORIES, np.array([b"d\xe9", b"e"])),
        replaced("obs/donor", np.array([b"d\xe9"] * N)),
        replaced("obs/donor", np.zeros((N, 3))),
        replaced("obs/donor", np.zeros((1, N))),
        replaced("obs/donor", np.array([[b"a", b"b"]] * N)),
        replaced("obs/donor", 1.0),
    ],
)
def test_a_damaged_column_is_named_before_computing_and_can_be_left_out(edit: Edit, tmp_path: Path) -> None:
    write(tmp_path, edit)
    result = invoke(tmp_path, "cells.h5ad")
    assert result.exit_code == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
    assert "'donor'" in error
    assert "obs_keys=['assay','score','n']" in error
    assert list(tmp_path.glob("out/*")) == []
    assert invoke(tmp_path, "cells.h5ad", obs_keys="'assay','score','n'").exit_code == 0
    assert embeddings(tmp_path).shape == (N, 32)


def test_a_damaged_column_that_the_model_needs_cannot_be_left_out(tmp_path: Path) -> None:
    write(tmp_path, replaced("obs/assay", np.zeros((N, 3))))
    result = invoke(tmp_path, "cells.h5ad")
    assert result.exit_code == 1
    assert "column 'assay' is an array of shape (24, 3)" in result.stderr
    assert "obs_keys" not in result.stderr


@pytest.mark.parametrize("part", ["obs", "var"])
def test_nullable_strings_may_name_cells_and_genes(part: str, tmp_path: Path) -> None:
    adata = anndata.read_h5ad(CELLS)
    names = adata.obs_names.tolist()
    frame = getattr(adata, part)
    frame.index = frame.index.astype("string")
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(tmp_path / "cells.h5ad")
    result = invoke(tmp_path, "cells.h5ad")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("24 cells: ")
    assert anndata.read_h5ad(tmp_path / "out" / "embeddings.h5ad").obs_names.tolist() == names


@pytest.mark.parametrize(
    "columns",
    [
        {"assay": "EFO:0009922"},
        {"assay": " 10X  3’ V3"},  # noqa: RUF001
        {"assay": np.nan, "assay_ontology_term_id": "EFO:0009922"},
        {"assay": "Chromium", "assay_ontology_term_id": pd.Categorical(["EFO:0009922"] * N)},
    ],
)
def test_assays_in_other_words_give_the_same_numbers(columns: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, assay="10x 3' v3")
    assert invoke(tmp_path, "cells.h5ad").exit_code == 0
    expected = embeddings(tmp_path)
    write(tmp_path, **columns)
    result = invoke(tmp_path, "cells.h5ad")
    assert 'taken as "10x 3\' v3"' in result.stderr
    assert "unknown assay" not in result.stderr
    np.testing.assert_array_equal(embeddings(tmp_path), expected)


@pytest.mark.parametrize("prefix", ["GRCh38_", "hg19_", "GRCh38__"])
def test_genes_of_another_genome_beside_ours_change_nothing(prefix: str, tmp_path: Path) -> None:
    write(tmp_path)
    assert invoke(tmp_path, "cells.h5ad").exit_code == 0
    expected = embeddings(tmp_path)
    adata = anndata.read_h5ad(CELLS)
    mouse = adata[:, :50].copy()
    mouse.var = pd.DataFrame(
        {"ensembl_id": [f"mm10___ENSMUSG{i:011d}" for i in range(50)]}, index=mouse.var_names + "m"
    )
    adata.var["ensembl_id"] = prefix + adata.var["ensembl_id"].astype(str)
    both = anndata.concat([adata, mouse], axis="var")
    both.obs = adata.obs
    both.write_h5ad(tmp_path / "cells.h5ad")
    result = invoke(tmp_path, "cells.h5ad")
    assert "genes of several species: homo_sapiens (340 genes, " in result.stderr
    np.testing.assert_allclose(embeddings(tmp_path), expected, atol=1e-6)


KINDS = {
    "text": np.array(["a", "b"] * 12, object),
    "text categories": pd.Categorical(["a", "b"] * 12),
    "ordered": pd.Categorical(["a", "b"] * 12, ordered=True),
    "integer categories": pd.Categorical([1, 2] * 12),
    "integers": np.arange(N),
    "booleans": np.array([True, False] * 12),
    "nullable": pd.array([1, None] * 12, dtype="Int64"),
    "missing": np.full(N, np.nan),
}


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize(
    "first", ["integer categories", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("booleans", "ordered"))]
)
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_columns_of_any_two_kinds_are_joined(first: str, second: str, tmp_path: Path) -> None:
    for name, kind in (("a.h5ad", first), ("b.h5ad", second)):
        write(tmp_path, name=name, age=KINDS[kind])
    result = invoke(tmp_path, "a.h5ad", "b.h5ad")
    assert result.exit_code == 0, result.output
    joined = anndata.read_h5ad(tmp_path / "out" / "embeddings.h5ad").obs["age"]
    expected = [value for kind in (first, second) for value in pd.Series(KINDS[kind])]
    for found, value in zip(joined, expected, strict=True):
        assert (pd.isna(found) and pd.isna(value)) or str(found) == str(value) or float(found) == float(value)
