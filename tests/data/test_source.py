from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tests.h5ad_files import GENES, make_adata
from transcriptformer.config import DataConfig
from transcriptformer.data.counts import check_memory, to_canonical_csr
from transcriptformer.data.source import CellSource, open_source
from transcriptformer.data.species import looks_like_gene_ids
from transcriptformer.errors import DataError
from transcriptformer.runtime.memory import available_memory


def all_counts(cells: CellSource) -> np.ndarray:
    return cells.counts(0, len(cells)).toarray()


MATRIX = np.array([[0, 3, 0, 1], [2, 0, 0, 0], [0, 0, 0, 0]], dtype=np.float32)


def unsorted_csr_with_zeros_and_repeats() -> sparse.csr_matrix:
    return sparse.csr_matrix(
        (np.array([1, 1, 0, 2, 2], np.float32), np.array([3, 1, 2, 1, 0]), np.array([0, 4, 5, 5])), shape=(3, 4)
    )


@pytest.mark.parametrize(
    "values",
    [
        MATRIX,
        MATRIX.astype(np.int64),
        MATRIX.astype(np.float64),
        sparse.csr_matrix(MATRIX),
        sparse.csc_matrix(MATRIX),
        sparse.csr_array(MATRIX),
        sparse.csc_array(MATRIX),
        unsorted_csr_with_zeros_and_repeats(),
    ],
    ids=lambda values: f"{type(values).__name__}-{values.dtype}",
)
def test_all_kinds_of_matrices_are_converted_to_the_same_csr(values: object) -> None:
    matrix = to_canonical_csr(values)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix.indptr, [0, 2, 3, 3])
    np.testing.assert_array_equal(matrix.indices, [1, 3, 0])
    np.testing.assert_array_equal(matrix.data, [3, 1, 2])


def test_the_input_matrix_is_not_modified() -> None:
    values = unsorted_csr_with_zeros_and_repeats()
    before = values.data.copy(), values.indices.copy(), values.indptr.copy()
    to_canonical_csr(values)
    for after, expected in zip((values.data, values.indices, values.indptr), before, strict=True):
        np.testing.assert_array_equal(after, expected)


def with_raw() -> anndata.AnnData:
    """Cells whose `.raw` has three genes and other counts than `.X`, which has the last two genes."""
    adata = make_adata([[1, 2, 3], [4, 5, 6]])
    raw = adata.copy()
    raw.X = raw.X * 10
    adata.raw = raw
    return adata[:, 1:].copy()


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize(
    ("use_raw", "scale", "n_genes"), [(True, 10, 3), (None, 10, 3), ("auto", 10, 3), (False, 1, 2)]
)
def test_counts_and_gene_ids_come_from_the_same_place(
    tmp_path: Path, use_raw: bool | str | None, scale: int, n_genes: int, from_file: bool
) -> None:
    adata = with_raw()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    cells = open_source(tmp_path / "cells.h5ad" if from_file else adata, DataConfig(use_raw=use_raw))
    assert list(cells.gene_ids) == GENES[3 - n_genes : 3]
    np.testing.assert_array_equal(all_counts(cells), scale * np.array([[1, 2, 3], [4, 5, 6]])[:, 3 - n_genes :])


def test_auto_uses_x_without_raw() -> None:
    np.testing.assert_array_equal(all_counts(open_source(make_adata([[1, 2]]), DataConfig(use_raw=None))), [[1, 2]])


@pytest.mark.parametrize("column", ["index", "gene"])
def test_gene_ids_may_be_the_index_of_var(column: str) -> None:
    adata = make_adata([[1, 2]])
    adata.var = pd.DataFrame(index=pd.Index(GENES[:2], name="gene"))
    assert list(open_source(adata, DataConfig(gene_col_name=column)).gene_ids) == GENES[:2]


def test_versions_of_gene_ids_are_dropped() -> None:
    adata = make_adata([[1, 2]], genes=[f"{GENES[0]}.12", GENES[1]])
    assert list(open_source(adata).gene_ids) == GENES[:2]


def test_first_of_duplicate_genes_is_kept_on_request(caplog: pytest.LogCaptureFixture) -> None:
    adata = make_adata([[1, 2, 3]], genes=[f"{GENES[0]}.1", GENES[1], f"{GENES[0]}.2"])
    with pytest.raises(DataError, match=rf"duplicate gene ids.*{GENES[0]}.*add --duplicate-genes first"):
        open_source(adata)
    cells = open_source(adata, DataConfig(remove_duplicate_genes=True))
    assert cells.is_duplicate.tolist() == [False, False, True]
    assert "1 columns with duplicate gene ids, dropped" in caplog.text


def test_columns_without_a_gene_id_are_not_duplicates() -> None:
    adata = make_adata([[1, 2, 3, 4]], genes=[GENES[0], None, np.nan, ""])  # type: ignore[list-item]
    assert list(open_source(adata).gene_ids) == [GENES[0], "", "", ""]


def test_symbols_with_dots_are_distinguished_from_versions() -> None:
    genes = ["TP53", "RP11-34P13.3", "RP11-34P13.7"]
    assert list(open_source(make_adata([[1, 2, 3]], genes=genes)).gene_ids) == genes


def test_a_gene_column_missing_in_raw_is_reported_as_such() -> None:
    adata = make_adata([[1, 2]])
    adata.raw = anndata.AnnData(adata.X, var=pd.DataFrame(index=["TP53", "BRCA1"]))
    with pytest.raises(DataError, match=r"raw\.var \(--use-raw false .* no column 'ensembl_id'"):
        open_source(adata, DataConfig(gene_col_name="ensembl_id"))


@pytest.mark.parametrize("shape", [(1, 3), (3, 3), (2, 2), (2, 4), (2,)])
def test_a_matrix_whose_shape_differs_from_its_metadata_is_damaged(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "cells.h5ad"
    adata = make_adata([[1, 2, 3], [4, 5, 6]])
    adata.X = adata.X.toarray()
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        attributes = dict(file["X"].attrs)
        del file["X"]
        file["X"] = np.ones(shape, np.float32)
        file["X"].attrs.update(attributes)
    with pytest.raises(DataError, match=r"damaged: counts of shape .* for 2 cells and 3 genes"):
        open_source(path)


@pytest.mark.parametrize("matrix_format", [sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize(("part", "values"), [("indices", [-1, 0]), ("indices", [7, 0]), ("indptr", [0, 9, 2])])
def test_a_matrix_with_invalid_indices_is_damaged(
    tmp_path: Path, part: str, values: list[int], matrix_format: Callable[[object], object]
) -> None:
    path = tmp_path / "cells.h5ad"
    adata = make_adata([[1, 0], [0, 2]])
    adata.X = matrix_format(adata.X)
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file[f"X/{part}"][...] = values
    with pytest.raises(DataError, match="damaged"):
        all_counts(open_source(path))


@pytest.mark.parametrize("values", [np.array([["a", "b"]]), np.array([[1j, 2j]])])
def test_non_numeric_counts_are_refused(values: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"my\.h5ad: counts are a ndarray of"):
        to_canonical_csr(values, "my.h5ad")


def test_files_of_the_first_anndata_releases_are_read(tmp_path: Path) -> None:
    """These have data frames as HDF5 tables, and keys such as `raw.X`."""
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        file["obs"] = np.array([(b"c0",), (b"c1",)], dtype=[("index", "S2")])
        for var, matrix in (("var", "X"), ("raw.var", "raw.X")):
            file[var] = np.array(
                [(g.encode(), g.encode()) for g in GENES[:2]], dtype=[("index", "S15"), ("ensembl_id", "S15")]
            )
            file[matrix] = np.array([[1, 2], [0, 4]], np.float32) / (1 if matrix == "raw.X" else 8)
    cells = open_source(path)
    assert list(cells.gene_ids) == GENES[:2]
    assert list(cells.obs.rows(0, 2).index) == ["c0", "c1"]
    np.testing.assert_array_equal(all_counts(cells), [[1, 2], [0, 4]])


@pytest.mark.parametrize(
    ("bad", "kind"), [(-1.0, "negative"), (np.nan, "NaN or infinite"), (np.inf, "NaN or infinite")]
)
def test_invalid_counts_are_reported_with_cell_and_gene(bad: float, kind: str) -> None:
    with pytest.raises(DataError, match=rf"counts are {kind}, first in cell 'c1' \(row 1\), gene {GENES[2]}"):
        all_counts(open_source(make_adata([[1, 0, 2], [0, 3, bad]])))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["ENSG00000139618.19", "ENSMUSG00000024798"], True),
        (["FBgn0031208", "WBGene00000001"], True),
        (["YAL001C", "YBR024W-A"], True),
        (["TP53", "BRCA1", "MALAT1"], False),
        (["1", "2"], False),
        ([], False),
    ],
)
def test_gene_ids_are_distinguished_from_symbols(values: list[str], expected: bool) -> None:
    assert looks_like_gene_ids(values) is expected


def test_a_matrix_that_does_not_fit_into_memory_is_refused_with_advice() -> None:
    check_memory(available_memory() // 4, "x.h5ad: converting", "store it by row", max_share=0.5)
    with pytest.raises(
        DataError, match=r"^x\.h5ad: converting takes \d+\.\d GiB of memory, but only .* GiB are free; store it by row$"
    ):
        check_memory(available_memory(), "x.h5ad: converting", "store it by row", max_share=0.5)
