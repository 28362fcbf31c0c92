import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.h5ad_files import random_adata
from transcriptformer.config import DataConfig
from transcriptformer.data.counts import to_canonical_csr
from transcriptformer.data.tokenize import Tokens, cells_to_keep, select_genes, tokenize, tokens_of_columns
from transcriptformer.errors import DataError
from transcriptformer.vocab import GeneVocab

VOCAB = GeneVocab(("unknown", "[PAD]", "[START]", "[END]"), {"A": 4, "B": 5, "C": 6, "D": 7})


def ragged(*cells: dict[int, float]) -> Tokens:
    """Cells as gene → count."""
    return Tokens(
        np.array([gene for cell in cells for gene in cell], dtype=np.int32),
        np.array([count for cell in cells for count in cell.values()], dtype=np.float32),
        np.cumsum([0, *map(len, cells)]),
    )


def cells_of(tokens: Tokens) -> list[dict[int, float]]:
    bounds = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    return [dict(zip(tokens.genes[a:b].tolist(), tokens.counts[a:b].tolist(), strict=True)) for a, b in bounds]


def tokenized(cells: Tokens, config: DataConfig, seq_len: int = 100) -> list[dict[int, float]]:
    return cells_of(tokenize(cells, config, seq_len, np.arange(len(cells.lengths))))


def test_genes_keep_column_order_and_unknown_genes_are_dropped() -> None:
    counts = to_canonical_csr(np.array([[1, 2, 3, 4], [0, 0, 5, 0], [0, 6, 0, 0]]))
    columns = tokens_of_columns(np.array(["C", "x", "A", "D"], dtype=object), VOCAB, filter_to_vocabs=True, name="")
    assert cells_of(select_genes(counts, columns)) == [{6: 1, 4: 3, 7: 4}, {4: 5}, {}]


def test_unknown_genes_can_be_kept() -> None:
    counts = to_canonical_csr(np.array([[1, 2, 3]]))
    columns = tokens_of_columns(np.array(["C", "x", "A"], dtype=object), VOCAB, filter_to_vocabs=False, name="")
    assert cells_of(select_genes(counts, columns)) == [{6: 1, 0: 2, 4: 3}]


def test_no_gene_in_the_vocabulary_is_an_error() -> None:
    with pytest.raises(DataError, match=r"cells\.h5ad: none of its 2 genes .* has x, y, …; the vocabulary has A, B"):
        tokens_of_columns(np.array(["x", "y"], dtype=object), VOCAB, True, "cells.h5ad")


def test_few_genes_in_the_vocabulary_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    gene_ids = np.array(["A", *(f"x{i}" for i in range(10))], dtype=object)
    tokens_of_columns(gene_ids, VOCAB, True, "cells.h5ad")
    assert "only 1 of 11 genes (9.1 %)" in caplog.text
    assert "the file has A, x0, x1, …; the vocabulary has A, B, C, …" in caplog.text
    caplog.clear()
    tokens_of_columns(gene_ids[:10], VOCAB, True, "cells.h5ad")  # a tenth is enough
    assert caplog.records == []


def test_long_cells_are_truncated() -> None:
    cells = ragged({4: 1, 5: 2, 6: 3}, {7: 4}, {})
    assert tokenized(cells, DataConfig(), seq_len=2) == [{4: 1, 5: 2}, {7: 4}, {}]


def test_counts_are_clipped() -> None:
    assert tokenized(ragged({4: 31, 5: 30, 6: 1}), DataConfig(clip_counts=30)) == [{4: 30, 5: 30, 6: 1}]


def test_normalization_follows_truncation_and_precedes_clipping() -> None:
    config = DataConfig(normalize_to_scale=40, clip_counts=25)
    assert tokenized(ragged({4: 3, 5: 1, 6: 996}, {}), config, seq_len=2) == [{4: 25, 5: 10}, {}]


def test_sorting_is_stable_by_count_and_precedes_truncation() -> None:
    cells = ragged({4: 1, 5: 7, 6: 7, 7: 2}, {6: 1, 4: 2})
    result = tokenized(cells, DataConfig(sort_genes=True), seq_len=3)
    assert [list(cell) for cell in result] == [[5, 6, 7], [4, 6]]


def test_shuffling_depends_only_on_seed_and_cell() -> None:
    cell = dict.fromkeys(range(4, 40), 1.0)
    config = DataConfig(randomize_genes=True, seed=1)
    together = tokenized(ragged(cell, cell), config)
    separate = cells_of(tokenize(ragged(cell), config, 100, np.array([1])))
    other_seed = tokenized(ragged(cell, cell), DataConfig(randomize_genes=True, seed=2))

    assert sorted(together[0]) == sorted(cell)
    assert list(together[0]) != list(cell)
    assert list(together[0]) != list(together[1])
    assert list(together[1]) == list(separate[0])
    assert list(together[0]) != list(other_seed[0])


@pytest.mark.parametrize(
    ("totals", "filter_outliers", "kept"),
    [
        ([1, 3, 1, 3], 1.0, []),  # mean 2, standard deviation 1
        ([1, 3, 1, 3], 1.01, [0, 1, 2, 3]),
        ([2, 2, 2, 2, 20], 1.5, [0, 1, 2, 3]),
        ([2, 2, 2, 2, 20], 0, [0, 1, 2, 3, 4]),
    ],
)
def test_outlier_filter_bounds_are_exclusive(totals: list[float], filter_outliers: float, kept: list[int]) -> None:
    lengths = np.ones(len(totals), np.int32)
    assert np.flatnonzero(cells_to_keep(lengths, np.array(totals, float), filter_outliers, 0)).tolist() == kept


def test_cells_with_too_few_genes_are_dropped() -> None:
    assert cells_to_keep(np.array([2, 1, 0, 3]), np.ones(4), 0, min_expressed_genes=2).tolist() == [1, 0, 0, 1]


@given(st.lists(st.integers(0, 11), min_size=1, max_size=20))
def test_taking_rows_equals_taking_them_one_by_one(rows: list[int]) -> None:
    counts = to_canonical_csr(random_adata(12, n_genes=15, density=0.2).X)
    tokens = Tokens(counts.indices, counts.data, counts.indptr.astype(np.int64))
    all_cells = cells_of(tokens)
    assert cells_of(tokens.take(np.array(rows))) == [all_cells[row] for row in rows]


def test_matching_genes_log_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tokens_of_columns(np.array(["A", "B"], dtype=object), VOCAB, True, "")
    assert caplog.records == []
