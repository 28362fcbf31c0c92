"""The cells of one or several sources as a stream of batches, of cells of like length, at their own length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from transcriptformer.data.prefetch import prefetch
from transcriptformer.data.reader import CellBlock, CellReader
from transcriptformer.data.tokenize import Tokens
from transcriptformer.data.workers import shard_of_worker, start_workers

BATCHES_AHEAD = 4
"""Batches that are made ready while one is computed."""

LENGTH_MULTIPLE = 8
"""Batches are padded to a multiple of this many positions: few shapes, little padding."""


class Batch(NamedTuple):
    """Cells as the model takes them; B cells, L positions, A auxiliary columns.

    Attributes
    ----------
    rows
        Where each cell stands among the kept cells (B,), int64.
    gene_tokens
        (B, L), int64, [PAD] after a cell's last gene.
    gene_counts
        (B, L), float32, 0 after a cell's last gene.
    aux_tokens
        (B, A), int64.
    """

    rows: Tensor
    gene_tokens: Tensor
    gene_counts: Tensor
    aux_tokens: Tensor

    def pinned(self) -> "Batch":
        """The same in memory from which a GPU can fetch it by itself."""
        return Batch(*(values.pin_memory() for values in self))


@dataclass(frozen=True)
class BatchLimits:
    """How large a batch may be."""

    max_cells: int
    """Most cells."""
    max_tokens: int
    """Most positions, padding included; a single cell may have more."""


class CellDataset(IterableDataset[CellBlock]):
    """The kept cells of several sources, as a stream of blocks of consecutive cells, each of which is read at once.

    Blocks are dealt out to processes and their workers in turn.

    Parameters
    ----------
    readers
        The sources, in order.
    kept
        Which of all their cells to serve (cells,), bool.
    lengths
        Genes of each of all cells (cells,).
    block_size
        Most cells that are read at once.
    """

    def __init__(self, readers: Sequence[CellReader], kept: np.ndarray, lengths: np.ndarray, block_size: int) -> None:
        self.readers, self.kept = readers, kept
        self.lengths = lengths[kept]
        self.block_size, self.n_kept = block_size, int(kept.sum())
        self.is_done = np.zeros(self.n_kept, bool)
        self.process, self.n_processes = 0, 1

    def deal_out(self, process: int, n_processes: int, is_done: np.ndarray) -> None:
        """Serve one process of several, and leave out rows whose results are there, `is_done` (kept cells,).

        All processes must be told the same of what is done, for it decides which blocks each of them gets.
        """
        self.process, self.n_processes, self.is_done = process, n_processes, is_done

    def __iter__(self) -> Iterator[CellBlock]:
        shard, n_shards = shard_of_worker(self.process, self.n_processes)
        # Small inputs are cut into smaller blocks, so that every process and worker has some.
        n_left = self.n_kept - int(self.is_done.sum())
        share = max(1, -(-n_left // (2 * n_shards)))
        block_size = min(self.block_size, share) if n_shards > 1 else self.block_size
        unfinished = (
            (reader, start, cells[todo], rows[todo])
            for reader, start, cells, rows in _blocks(self.readers, self.kept, block_size)
            if (todo := ~self.is_done[rows]).any()
        )
        for reader, start, cells, rows in islice(unfinished, shard, None, n_shards):
            yield reader.block(start, cells, rows)


def _blocks(
    readers: Sequence[CellReader], kept: np.ndarray, block_size: int
) -> Iterator[tuple[CellReader, int, np.ndarray, np.ndarray]]:
    """Of each block the source, where it starts there, its kept cells there, and their rows among all kept cells."""
    first_cell = first_row = 0
    for reader in readers:
        for start in range(0, len(reader), block_size):
            stop = min(start + block_size, len(reader))
            cells = start + np.flatnonzero(kept[first_cell + start : first_cell + stop])
            yield reader, start, cells, first_row + np.arange(len(cells))
            first_row += len(cells)
        first_cell += len(reader)


class BatchLoader:
    """Batches of cells of like length, made of the blocks of a dataset.

    A thread makes them while earlier ones are computed. Within a block, batches do not follow the order of the file, so
    that little is spent on padding; `Batch.rows` tells where each cell belongs. Worker processes hand over whole
    blocks, for every hand-over costs some milliseconds.

    Parameters
    ----------
    dataset
        Where the blocks come from.
    limits
        Of a batch.
    pad
        Token after a cell's last gene.
    seq_len
        Most positions of a cell.
    min_positions
        Pad every cell to at least this many positions.
    n_workers
        Processes that read; 0: this one does.
    pin_memory
        Put batches where a GPU can fetch them by itself.
    """

    def __init__(
        self,
        dataset: CellDataset,
        limits: BatchLimits,
        pad: int,
        seq_len: int,
        min_positions: int = 0,
        n_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.limits, self.pad, self.seq_len, self.min_positions = limits, pad, seq_len, min_positions
        self.pin_memory = pin_memory
        self.blocks = DataLoader(dataset, batch_size=None, collate_fn=as_is, num_workers=n_workers)

    @property
    def lengths(self) -> np.ndarray:
        """Genes of each cell to come, or of others like them."""
        dataset: Any = self.blocks.dataset
        return dataset.lengths[~dataset.is_done][:: dataset.n_processes]

    def __iter__(self) -> Iterator[Batch]:
        blocks = start_workers(self.blocks)  # here, for it may start processes, which a thread should not
        return prefetch(self._batches(blocks), BATCHES_AHEAD)

    def _batches(self, blocks: Iterator[CellBlock]) -> Iterator[Batch]:
        for block in blocks:
            for batch in batches_of(block, self.limits, self.pad, self.seq_len, self.min_positions):
                yield batch.pinned() if self.pin_memory else batch


def as_is(block: Any) -> Any:
    """What a DataLoader is to do with what a dataset yields."""
    return block


def batches_of(
    block: CellBlock, limits: BatchLimits, pad: int, seq_len: int, min_positions: int = 0
) -> Iterator[Batch]:
    """The cells of a block in batches of cells of like length, the longest first."""
    for cells in group_by_length(block.tokens.lengths, limits, seq_len, min_positions):
        genes, counts = pad_to_common_length(block.tokens.take(cells), pad, seq_len, min_positions)
        arrays = block.rows[cells], genes, counts, block.aux_tokens[cells]
        yield Batch(*map(torch.from_numpy, arrays))


def group_by_length(
    lengths: np.ndarray, limits: BatchLimits, seq_len: int, min_positions: int = 0
) -> Iterator[np.ndarray]:
    """Indices of the cells of each batch: the longest first, as many as the limits allow.

    Parameters
    ----------
    lengths
        Genes of each cell (cells,).
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        n_positions = positions(int(lengths[order[start]]), seq_len, min_positions)
        size = min(limits.max_cells, max(1, limits.max_tokens // n_positions))
        yield order[start : start + size]
        start += size


def positions(longest: int, seq_len: int, min_positions: int = 0) -> int:
    """Positions of a batch whose longest cell has `longest` genes.

    There is room for one more, for [START] moves every gene up by one; the number is a multiple of `LENGTH_MULTIPLE`,
    or `seq_len` where that is less.
    """
    return min(-(-max(longest + 1, min_positions) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, seq_len)


def pad_to_common_length(
    tokens: Tokens, pad: int, seq_len: int, min_positions: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Gene tokens, int64, and counts, float32, as (cells, positions) arrays."""
    lengths = tokens.lengths
    width = positions(int(lengths.max(initial=0)), seq_len, min_positions)
    is_gene = np.arange(width) < lengths[:, None]  # (cells, positions)
    genes = np.full(is_gene.shape, pad, dtype=np.int64)
    counts = np.zeros(is_gene.shape, dtype=np.float32)
    genes[is_gene], counts[is_gene] = tokens.genes, tokens.counts
    return genes, counts
