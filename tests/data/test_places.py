"""Counts are taken from where whole numbers are, or one line says what is where."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tests.h5ad_files import make_adata, random_adata
from transcriptformer.config import DataConfig
from transcriptformer.data.anndata_contents import contents_of_adata
from transcriptformer.data.formats import open_contents
from transcriptformer.data.places import Kind, choose_place, kind_of
from transcriptformer.data.source import CellSource, open_source
from transcriptformer.errors import DataError
from transcriptformer.vocab import make_gene_vocab


def log_normalized(counts: sparse.csr_matrix, scale: float = 1e4) -> sparse.csr_matrix:
    scaled = sparse.diags(scale / np.asarray(counts.sum(1)).ravel()) @ counts
    return sparse.csr_matrix(scaled.log1p().astype(np.float32))


def normalized(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    return sparse.csr_matrix((sparse.diags(1e4 / np.asarray(counts.sum(1)).ravel()) @ counts).astype(np.float32))


def centered(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    return sparse.csr_matrix(log_normalized(counts).toarray() - 0.3)


def corrected(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    values = counts.copy()
    values.data[::3] -= 0.37
    values.data[0] = 400
    return values


KINDS = {
    Kind.WHOLE: lambda counts: counts,
    Kind.LOG: log_normalized,
    Kind.NORMALIZED: normalized,
    Kind.SCALED: centered,
    Kind.FRACTIONAL: corrected,
}


def cells() -> anndata.AnnData:
    """Cells whose smallest count is 1, as in most data."""
    adata = random_adata(300, n_genes=120, density=0.4)
    adata.X.data[adata.X.indptr[:-1][np.diff(adata.X.indptr) > 0]] = 1
    return adata


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_values_are_told_apart(kind: Kind) -> None:
    assert kind_of(sparse.csr_array(KINDS[kind](cells().X))) == kind


def test_a_matrix_of_zeros_or_ones_is_taken_only_if_there_is_no_other() -> None:
    adata = cells()
    counts = adata.X.copy()
    for empty in (0 * counts, (counts > 0).astype(np.float32)):
        adata.X = sparse.csr_matrix(empty)
        adata.layers["counts"] = counts
        assert open_source(adata).place == "layers['counts']"
        del adata.layers["counts"]
        assert open_source(adata).describe()["counts"] == "counts from .X"


def test_logarithms_of_counts_that_were_not_scaled_are_recovered() -> None:
    adata = make_adata([[2, 4, 0], [0, 6, 2]])
    counts = adata.X.copy()
    adata.X = sparse.csr_matrix(np.log1p(counts.toarray()))
    assert_counts(open_source(adata, DataConfig(recover_counts=True)), counts)


def assert_counts(source: CellSource, expected: sparse.csr_matrix) -> None:
    np.testing.assert_array_equal(source.counts(0, len(source)).toarray(), expected.toarray())


@pytest.mark.parametrize("where", [".raw.X", ".X", "layers['counts']", "layers['raw_counts']"])
def test_whole_numbers_are_found(where: str) -> None:
    adata = cells()
    counts = adata.X.copy()
    adata.X = log_normalized(counts)
    adata.raw = adata.copy()
    if where == ".raw.X":
        raw = adata.copy()
        raw.X = counts
        adata.raw = raw
    elif where == ".X":
        adata.X = counts
    else:
        adata.layers[where.split("'")[1]] = counts
    source = open_source(adata)
    assert source.place == where
    assert_counts(source, counts)
    if where != ".raw.X":
        assert source.describe()["counts"].startswith(f"counts from {where} (.raw.X is log-normalized")


def test_the_published_rule_takes_raw_whatever_it_holds() -> None:
    adata = cells()
    adata.raw = adata.copy()
    adata.raw.X.data[:] = 0.5
    assert open_source(adata).place == ".X"
    assert open_source(adata, DataConfig(use_raw="published")).place == ".raw.X"
    assert open_source(cells(), DataConfig(use_raw="published")).place == ".X"


def test_where_nothing_is_whole_one_line_says_what_is_where() -> None:
    adata = cells()
    adata.layers["scaled"] = centered(adata.X)
    adata.X = log_normalized(adata.X)
    adata.raw = adata.copy()
    with pytest.raises(DataError) as refused:
        open_source(adata)
    assert str(refused.value) == (
        "the AnnData: no raw counts: .raw.X is log-normalized?, .X is log-normalized?; not looked at: layers['scaled'] "
        "(name one with --layer); the counts can be read off exactly: add --recover-counts; the model needs whole "
        "numbers of molecules or reads (to embed these values anyway, set --use-raw true or false)"
    )
    assert open_source(adata, DataConfig(use_raw=False)).place == ".X"


def test_corrected_counts_are_accepted() -> None:
    adata = cells()
    adata.X = corrected(adata.X)
    assert open_source(adata).reason == "no matrix holds whole numbers"


def test_places_with_different_whole_numbers_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    adata = cells()
    adata.layers["counts"] = adata.X.copy()
    assert open_source(adata).place == ".X"
    assert caplog.text == ""
    adata.layers["counts"].data[:] += 1
    open_source(adata)
    assert ".X and layers['counts'] hold different whole numbers; taking .X" in caplog.text


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("ending", ["h5ad", "zarr", "AnnData", "backed"])
def test_matrices_by_column_are_not_loaded_to_choose_one(
    tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    adata = cells()
    adata.layers["counts"] = (2 * adata.X).tocsc()
    adata.X = adata.X.tocsc()
    path = tmp_path / f"cells.{ending}"
    if ending != "AnnData":
        (adata.write_zarr if ending == "zarr" else adata.write_h5ad)(path)
    source = anndata.read_h5ad(path, backed="r") if ending == "backed" else adata if ending == "AnnData" else path
    is_adata = isinstance(source, anndata.AnnData)
    contents = contents_of_adata(source, "cells", False) if is_adata else open_contents(path, DataConfig())
    assert choose_place(contents, None, None).place.name == ".X"
    assert ".X and layers['counts'] hold different whole numbers; taking .X" in caplog.text
    assert not any("in_memory" in vars(place.matrix) for place in contents.places.values())
    assert_counts(open_source(source), adata.X)


@pytest.mark.parametrize("kind", [Kind.LOG, Kind.SCALED, Kind.FRACTIONAL])
def test_matrices_by_column_are_told_apart_like_those_by_row_if_no_other_holds_counts(kind: Kind) -> None:
    adata = cells()
    adata.X = sparse.csc_matrix(KINDS[kind](adata.X))
    assert contents_of_adata(adata, "cells", False).places[".X"].kind == kind


@pytest.mark.parametrize("by_column", [".X", "counts"])
def test_a_matrix_by_column_that_is_too_large_and_not_needed_is_left_alone(
    tmp_path: Path, by_column: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    adata = cells()
    counts = adata.X.copy()
    if by_column == ".X":
        adata.layers["counts"], adata.X = counts, log_normalized(counts).tocsc()
    else:
        adata.layers["counts"] = counts.tocsc()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setattr("transcriptformer.data.counts.available_memory", lambda: 1000)
    source = open_source(tmp_path / "cells.h5ad")
    assert_counts(source, counts)
    assert source.reason == (".X is not whole numbers" if by_column == ".X" else "")
    assert caplog.text == ""
    with pytest.raises(DataError, match=r"stored by column .*, but only 0\.0 GiB are free"):
        open_source(
            tmp_path / "cells.h5ad",
            DataConfig(layer=by_column, use_raw=None) if by_column != ".X" else DataConfig(use_raw=False),
        )


def test_a_layer_can_be_named() -> None:
    adata = make_adata([[1, 2]])
    adata.layers["mine"] = 7 * adata.X
    assert_counts(open_source(adata, DataConfig(layer="mine")), 7 * adata.X)
    with pytest.raises(DataError, match="has no layer 'other'; its layers are: mine"):
        open_source(adata, DataConfig(layer="other"))


@pytest.mark.parametrize("change", [log_normalized, normalized])
def test_counts_are_recovered_exactly(change: object) -> None:
    adata = cells()
    counts = adata.X.copy()
    adata.X = change(counts)  # type: ignore[operator]
    source = open_source(adata, DataConfig(recover_counts=True))
    assert "counts recovered from" in source.reason
    assert_counts(source, counts)


@pytest.mark.parametrize(("log", "base"), [(np.log1p, "e"), (lambda x: np.log2(x + 1), "2"), (np.log10, "10")])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_logarithms_to_any_usual_base_are_known(log: object, base: str, is_scaled: bool) -> None:
    adata = cells()
    counts = adata.X.copy()
    adata.X = normalized(counts) if is_scaled else counts.copy()
    adata.X.data = log(adata.X.data + (base == "10")).astype(np.float32)  # type: ignore[operator]
    with pytest.raises(DataError, match=r"\.X is log-normalized\?; the counts can be read off exactly"):
        open_source(adata)
    source = open_source(adata, DataConfig(recover_counts=True))
    assert f"logarithms to base {base} undone" in source.reason
    assert ("taken as a count of 1" in source.reason) == is_scaled
    assert_counts(source, counts)


def test_recovered_counts_do_not_depend_on_the_block() -> None:
    adata = cells()
    counts = adata.X.copy()
    adata.X = normalized(counts)
    whole = sparse.csr_matrix(2 * counts[7].toarray(), dtype=np.float32)  # its factor happens to be 2
    adata.X = sparse.csr_matrix(sparse.vstack([adata.X[:7], whole, adata.X[8:]]))
    source = open_source(adata, DataConfig(recover_counts=True))
    assert (source.counts(7, 8).toarray() == source.counts(5, 9).toarray()[2:3]).all()
    assert_counts(source, counts)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(recover_counts=True, layer="countz"), "has no layer 'countz'"),
        (DataConfig(recover_counts=True, use_raw=True), r"has no \.raw"),
    ],
)
def test_a_place_that_is_named_is_not_replaced_to_recover_counts(config: DataConfig, message: str) -> None:
    adata = cells()
    adata.X = log_normalized(adata.X)
    with pytest.raises(DataError, match=message):
        open_source(adata, config)


def test_counts_that_cannot_be_recovered_are_refused() -> None:
    adata = cells()
    adata.X = sparse.csr_matrix(np.sqrt(adata.X.toarray()) + 0.1 * (adata.X.toarray() > 0))
    with pytest.raises(DataError, match="no values are whole multiples of each cell's smallest one"):
        open_source(adata, DataConfig(recover_counts=True))


def test_whole_numbers_need_no_recovery() -> None:
    adata = cells()
    assert_counts(open_source(adata, DataConfig(recover_counts=True)), adata.X)


@pytest.mark.parametrize(("policy", "expected"), [("first", [[1, 2, 3]]), ("sum", [[5, 2, 3]])])
def test_duplicate_genes_are_dropped_or_added(policy: str, expected: list[list[int]]) -> None:
    genes = ["ENSG00000000001.1", "ENSG00000000002", "ENSG00000000003", "ENSG00000000001.2"]
    source = open_source(make_adata([[1, 2, 3, 4]], genes=genes), DataConfig(duplicate_genes=policy))
    assert source.counts(0, 1).toarray()[:, ~source.is_duplicate].tolist() == expected


def test_duplicates_outside_the_vocabulary_change_nothing() -> None:
    known, other = "ENSG00000000001", "ENSG00000000009"
    vocab = make_gene_vocab([known], ["unknown"], "unknown")
    adata = make_adata([[1, 2, 3]], genes=[known, other, other])
    assert len(open_source(adata, vocab=vocab)) == 1
    with pytest.raises(DataError, match="1 columns have duplicate gene ids"):
        open_source(adata)
    with pytest.raises(DataError, match="1 columns have duplicate gene ids"):
        open_source(adata, DataConfig(filter_to_vocabs=False), vocab)


def test_a_gene_column_that_occurs_twice_is_refused() -> None:
    adata = make_adata([[1, 2]])
    adata.var = pd.DataFrame([["a", "b"], ["c", "d"]], columns=["gene_ids", "gene_ids"], index=adata.var_names)
    with pytest.raises(DataError, match="var has several columns 'gene_ids'"):
        open_source(adata, DataConfig(gene_col_name="gene_ids"))
