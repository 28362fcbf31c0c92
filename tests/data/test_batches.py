from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import GENES, make_adata, random_adata
from transcriptformer.checkpoint.vocabs import read_aux_vocab
from transcriptformer.config import DataConfig
from transcriptformer.data.batches import (
    LENGTH_MULTIPLE,
    Batch,
    BatchLimits,
    BatchLoader,
    CellDataset,
    group_by_length,
    positions,
)
from transcriptformer.data.reader import CellReader
from transcriptformer.data.source import open_source
from transcriptformer.data.survey import survey_cells
from transcriptformer.vocab import AuxVocab, GeneVocab

SPECIAL = ("unknown", "[PAD]", "[START]", "[END]")
VOCAB = GeneVocab(SPECIAL, {gene: i for i, gene in enumerate(GENES, start=len(SPECIAL))})
PAD = 1
ASSAY = read_aux_vocab(CHECKPOINT / "vocabs" / "assay_vocab.json", "assay", "unknown")


def make_readers(
    *sources: Path | anndata.AnnData, seq_len: int = 127, aux_vocabs: dict[str, AuxVocab] | None = None, **config: float
) -> list[CellReader]:
    aux_vocabs = {"assay": ASSAY} if aux_vocabs is None else aux_vocabs
    data = DataConfig(**config)  # type: ignore[arg-type]
    return [CellReader(open_source(source), VOCAB, aux_vocabs, data, seq_len) for source in sources]


def make_loader(
    *sources: Path | anndata.AnnData,
    seq_len: int = 127,
    max_cells: int = 4,
    max_tokens: int = 10**9,
    min_positions: int = 0,
    n_workers: int = 0,
    share: tuple[int, int] = (0, 1),
    is_done: np.ndarray | None = None,
    aux_vocabs: dict[str, AuxVocab] | None = None,
    **config: float,
) -> BatchLoader:
    readers = make_readers(*sources, seq_len=seq_len, aux_vocabs=aux_vocabs, **config)
    survey = survey_cells(readers, readers[0].config)
    dataset = CellDataset(readers, survey.kept, survey.lengths, readers[0].config.block_size)
    dataset.shard(*share, np.zeros(survey.n_kept, bool) if is_done is None else is_done)
    return BatchLoader(dataset, BatchLimits(max_cells, max_tokens), PAD, seq_len, min_positions, n_workers)


def only_batch(*sources: Path | anndata.AnnData, **settings: float) -> Batch:
    (batch,) = make_loader(*sources, **settings)  # type: ignore[arg-type]
    return batch


def rows_of(batches: BatchLoader) -> list[int]:
    return [row for batch in batches for row in batch.rows.tolist()]


def test_a_batch_holds_each_cells_genes_and_padding() -> None:
    batch = only_batch(make_adata([[2, 0, 0, 0], [0, 3, 0, 1]]))
    assert batch.rows.tolist() == [1, 0]  # longest first
    assert batch.gene_tokens[:, :3].tolist() == [[5, 7, PAD], [4, PAD, PAD]]
    assert batch.gene_counts[:, :3].tolist() == [[3, 1, 0], [2, 0, 0]]
    assert (batch.gene_tokens[:, 3:] == PAD).all()
    assert (batch.gene_counts[:, 3:] == 0).all()
    assert batch.aux_tokens.tolist() == [[ASSAY.ids["10x multiome"]]] * 2


@pytest.mark.parametrize(
    ("n_genes", "n_positions"),
    [(0, LENGTH_MULTIPLE), (LENGTH_MULTIPLE - 1, LENGTH_MULTIPLE), (LENGTH_MULTIPLE, 2 * LENGTH_MULTIPLE), (60, 50)],
)
def test_batches_are_padded_to_the_longest_cell_plus_start(n_genes: int, n_positions: int) -> None:
    counts = np.zeros((1, 60))
    counts[0, :n_genes] = 1
    assert only_batch(make_adata(counts), seq_len=50).gene_tokens.shape == (1, n_positions)


def test_cells_can_be_padded_to_full_length() -> None:
    assert only_batch(make_adata([[1, 2]]), seq_len=50, min_positions=50).gene_tokens.shape == (1, 50)


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("n_processes", [1, 3])
def test_every_cell_is_yielded_once_for_any_number_of_workers_and_processes(n_workers: int, n_processes: int) -> None:
    sources, rows = (random_adata(23, density=0.1), random_adata(9, seed=1)), []
    for process in range(n_processes):
        rows += rows_of(make_loader(*sources, block_size=5, n_workers=n_workers, share=(process, n_processes)))
    assert sorted(rows) == list(range(32))


def test_small_inputs_are_shared_between_processes() -> None:
    shares = [len(rows_of(make_loader(random_adata(12), share=(process, 3)))) for process in range(3)]
    assert shares == [4, 4, 4]


def test_done_cells_are_skipped() -> None:
    is_done = np.random.default_rng(0).random(20) < 0.5
    left = rows_of(make_loader(random_adata(20), block_size=6, is_done=is_done))
    assert sorted(left) == np.flatnonzero(~is_done).tolist()
    assert rows_of(make_loader(random_adata(20), is_done=np.ones(20, bool))) == []


def test_tokens_do_not_depend_on_the_block_size() -> None:
    adata = random_adata(30)
    for settings in ({}, {"randomize_genes": True}, {"sort_genes": True, "normalize_to_scale": 100}):
        cells = []
        for block_size in (4, 30):
            loader = make_loader(adata, max_cells=1, block_size=block_size, **settings)
            cells.append({int(batch.rows[0]): batch for batch in loader})
        for row in range(30):
            torch.testing.assert_close(cells[0][row], cells[1][row], rtol=0, atol=0)


def test_filters_apply_to_each_source_separately() -> None:
    shallow = make_adata([[1], [1], [1], [1], [9]])
    deep = make_adata([[900], [100], [100], [100], [100]])
    loader = make_loader(shallow, deep, filter_outliers=1.5, clip_counts=1000)
    counts = {
        row: count
        for batch in loader
        for row, count in zip(*(x.tolist() for x in (batch.rows, batch.gene_counts[:, 0])), strict=True)
    }
    assert counts == {0: 1, 1: 1, 2: 1, 3: 1, 4: 100, 5: 100, 6: 100, 7: 100}


@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=60),
    max_cells=st.integers(1, 20),
    max_tokens=st.integers(1, 2000),
)
def test_batches_respect_both_limits_and_contain_every_cell_once(
    lengths: list[int], max_cells: int, max_tokens: int
) -> None:
    cell_lengths, seen = np.array(lengths), []
    for chosen in group_by_length(cell_lengths, BatchLimits(max_cells, max_tokens), seq_len=100):
        n_positions = positions(int(cell_lengths[chosen].max()), 100)
        assert len(chosen) <= max_cells
        assert len(chosen) * n_positions <= max_tokens or len(chosen) == 1
        seen += chosen.tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_grouping_by_length_reduces_padding() -> None:
    lengths = np.random.default_rng(0).integers(0, 1000, 2048)
    batches = list(group_by_length(lengths, BatchLimits(16, 10**9), seq_len=2047))
    padded = sum(len(chosen) * positions(int(lengths[chosen].max()), 2047) for chosen in batches)
    assert lengths.sum() > 0.97 * padded
    in_file_order = sum(16 * positions(int(part.max()), 2047) for part in lengths.reshape(-1, 16))
    assert padded < 0.6 * in_file_order


def test_missing_metadata_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    adata = make_adata([[1], [1]])
    adata.obs["assay"] = ["not an assay", "Drop-seq"]
    adata.obs["assay"] = adata.obs["assay"].astype("category").cat.remove_categories("not an assay")
    assert sorted(only_batch(adata).aux_tokens.flatten().tolist()) == sorted([ASSAY.unknown, ASSAY.ids["Drop-seq"]])
    assert caplog.text == ""
    del adata.obs["assay"]
    assert only_batch(adata).aux_tokens.tolist() == [[ASSAY.unknown]] * 2
    assert "obs has no column 'assay'" in caplog.text


def test_a_checkpoint_without_metadata_columns_has_no_auxiliary_tokens() -> None:
    assert next(iter(make_loader(make_adata([[1, 2]]), aux_vocabs={}))).aux_tokens.shape == (1, 0)


def test_source_counts_are_not_modified() -> None:
    adata = random_adata(5)
    before = adata.X.copy()
    list(make_loader(adata, clip_counts=2, normalize_to_scale=100))
    np.testing.assert_array_equal(adata.X.toarray(), before.toarray())
