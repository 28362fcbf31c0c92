"""Training steps read from files by several processes and workers."""

from itertools import islice
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from tests.data.test_batches import PAD, make_readers
from tests.h5ad_files import random_adata
from transcriptformer.data.batches import Batch, BatchLimits
from transcriptformer.data.reader import CellReader
from transcriptformer.training.order import Blocks, Epochs
from transcriptformer.training.stream import StepLoader, TrainingDataset

N_CELLS = 150, 90

pytestmark = pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default")


@pytest.fixture
def readers(tmp_path: Path) -> list[CellReader]:
    files = [tmp_path / "first.h5ad", tmp_path / "second.zarr"]
    random_adata(N_CELLS[0], seed=1).write_h5ad(files[0])
    random_adata(N_CELLS[1], seed=2).write_zarr(files[1])
    return make_readers(*files, randomize_genes=True)


def epochs_of(batch_size: int = 16) -> Epochs:
    blocks = Blocks(N_CELLS, np.ones(sum(N_CELLS), bool), block_size=8)
    return Epochs(blocks, [1.0, 1.0], n_streams=4, window_size=16, batch_size=batch_size, seed=0)


def steps(
    readers: list[CellReader], share: tuple[int, int] = (0, 1), n_workers: int = 0, steps: range = range(30)
) -> list[list[Batch]]:
    dataset = TrainingDataset(readers, epochs_of(), steps, *share)
    return list(StepLoader(dataset, BatchLimits(5, 10**6), PAD, 127, n_workers))


def rows(step: list[Batch]) -> list[int]:
    return sorted(torch.cat([batch.rows for batch in step]).tolist())


def test_every_cell_occurs_once_per_epoch(readers: list[CellReader]) -> None:
    both = steps(readers)
    assert len(both) == 30
    for epoch in (both[:15], both[15:]):
        assert sorted(row for step in epoch for row in rows(step)) == list(range(sum(N_CELLS)))


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("n_processes", [1, 2])
def test_processes_and_workers_share_the_same_steps(
    readers: list[CellReader], n_processes: int, n_workers: int
) -> None:
    shares = [steps(readers, (process, n_processes), n_workers, range(20)) for process in range(n_processes)]
    single = steps(readers, steps=range(20))
    for parts, expected in zip(zip(*shares, strict=True), single, strict=True):
        together = [batch for part in parts for batch in part]
        assert rows(together) == rows(expected)
        assert contents(together) == contents(expected)


def contents(step: list[Batch]) -> dict[int, list[int]]:
    """Return the genes of each cell, in order."""
    cells = {}
    for batch in step:
        for row, genes in zip(batch.rows.tolist(), batch.gene_tokens, strict=True):
            cells[row] = genes[genes != PAD].tolist()
    return cells


def test_a_stream_can_start_at_any_step(readers: list[CellReader]) -> None:
    all_steps = steps(readers)
    for start in (1, 7, 15, 22):
        for step, expected in zip(steps(readers, steps=range(start, 30)), all_steps[start:], strict=True):
            assert contents(step) == contents(expected)


def test_genes_are_reordered_in_every_epoch(readers: list[CellReader]) -> None:
    both = steps(readers)
    first, second = ({k: v for step in epoch for k, v in contents(step).items()} for epoch in (both[:15], both[15:]))
    assert all(sorted(first[cell]) == sorted(second[cell]) for cell in first)
    assert sum(first[cell] != second[cell] for cell in first) > 0.95 * len(first)


def test_counts_stay_with_their_genes(readers: list[CellReader]) -> None:
    batch = next(iter(steps(readers, steps=range(1))))[0]
    adata = random_adata(N_CELLS[0], seed=1)
    row = next(i for i, row in enumerate(batch.rows.tolist()) if row < N_CELLS[0])
    genes, counts = batch.gene_tokens[row], batch.gene_counts[row]
    expected = np.minimum(adata.X[int(batch.rows[row])].toarray().ravel(), 30)
    n_special = 4
    for gene, count in zip(genes[genes != PAD].tolist(), counts.tolist(), strict=False):
        assert expected[gene - n_special] == count


def test_a_step_mixes_many_blocks() -> None:
    adata = random_adata(2048, n_genes=5, density=0.9)
    readers = make_readers(anndata.AnnData(adata.X, obs=adata.obs, var=adata.var))
    blocks = Blocks([2048], np.ones(2048, bool), block_size=16)
    epochs = Epochs(blocks, [1.0], n_streams=4, window_size=16 * 16, batch_size=128, seed=0)
    n_blocks = [len(set(block.rows // 16)) for block in islice(TrainingDataset(readers, epochs, range(16)), 16)]
    assert np.median(n_blocks) > 40  # of the 64 in memory
