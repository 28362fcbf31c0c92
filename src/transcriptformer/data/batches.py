"""Streaming the cells of one or more sources in batches of similar length."""

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
"""Batches prepared ahead of the one being computed."""

LENGTH_MULTIPLE = 8
"""Batch lengths are padded to a multiple of this, which limits both the number of shapes and the padding."""


class Batch(NamedTuple):
    """Model input: B cells, L positions, A auxiliary columns.

    Attributes
    ----------
    rows
        Index of each cell among the kept cells (B,), int64.
    gene_tokens
        (B, L), int64, padded with [PAD].
    gene_counts
        (B, L), float32, padded with 0.
    aux_tokens
        (B, A), int64.
    """

    rows: Tensor
    gene_tokens: Tensor
    gene_counts: Tensor
    aux_tokens: Tensor

    def size(self) -> tuple[int, int]:
        """Return the number of cells and of positions, padding included."""
        return len(self.rows), self.gene_tokens.numel()

    def halves(self) -> "tuple[Batch, Batch]":
        """Split into two batches of half as many cells."""
        middle = len(self.rows) // 2
        return Batch(*(values[:middle] for values in self)), Batch(*(values[middle:] for values in self))

    def pinned(self) -> "Batch":
        """Return a copy in pinned memory."""
        return Batch(*(values.pin_memory() for values in self))

    def to(self, device: torch.device) -> "Batch":
        """Return a copy on a device, without waiting for a GPU."""
        return Batch(*(values.to(device, non_blocking=device.type == "cuda") for values in self))


@dataclass(frozen=True)
class BatchLimits:
    """Limits on the size of a batch."""

    max_cells: int
    """Maximum number of cells."""
    max_tokens: int
    """Maximum number of positions, padding included; a single longer cell still gets a batch."""


class CellDataset(IterableDataset[CellBlock]):
    """Stream of the kept cells of several sources, in blocks of consecutive cells.

    Blocks are distributed round-robin over processes and their workers.

    Parameters
    ----------
    readers
        Readers of the sources, in order.
    kept
        Mask of the cells to yield (cells,), bool.
    lengths
        Number of genes of each cell (cells,).
    block_size
        Maximum number of cells per read.
    """

    def __init__(self, readers: Sequence[CellReader], kept: np.ndarray, lengths: np.ndarray, block_size: int) -> None:
        self.readers, self.kept = readers, kept
        self.lengths = lengths[kept]
        self.block_size, self.n_kept = block_size, int(kept.sum())
        self.is_done = np.zeros(self.n_kept, bool)
        self.process, self.n_processes = 0, 1

    def shard(self, process: int, n_processes: int, is_done: np.ndarray) -> None:
        """Yield only the blocks of one of several processes, without the rows that are already done (kept cells,).

        `is_done` must be the same in all processes, because it determines the assignment of blocks.
        """
        self.process, self.n_processes, self.is_done = process, n_processes, is_done

    def __iter__(self) -> Iterator[CellBlock]:
        shard, n_shards = shard_of_worker(self.process, self.n_processes)
        # Small inputs use smaller blocks, so that every process and worker gets some.
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
    """Yield each block's reader, start and kept cells in that source, and their rows among all kept cells."""
    first_cell = first_row = 0
    for reader in readers:
        for start in range(0, len(reader), block_size):
            stop = min(start + block_size, len(reader))
            cells = start + np.flatnonzero(kept[first_cell + start : first_cell + stop])
            yield reader, start, cells, first_row + np.arange(len(cells))
            first_row += len(cells)
        first_cell += len(reader)


class BatchLoader:
    """Iterable of batches of cells of similar length, made from the blocks of a dataset.

    A background thread prepares the next batches. To reduce padding, batches do not follow the file order within a
    block; `Batch.rows` holds the original positions. Worker processes send whole blocks, because each transfer costs
    milliseconds.

    Parameters
    ----------
    dataset
        Dataset that yields the blocks.
    limits
        Limits on the batch size.
    pad
        Padding token.
    seq_len
        Maximum number of positions of a cell.
    min_positions
        Pad every cell to at least this many positions.
    n_workers
        Number of worker processes; 0 to read in this process.
    pin_memory
        Put batches in pinned memory.
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
        self.blocks = DataLoader(dataset, batch_size=None, collate_fn=identity, num_workers=n_workers)

    @property
    def lengths(self) -> np.ndarray:
        """Number of genes of the remaining cells of this process, approximated by a regular sample."""
        dataset: Any = self.blocks.dataset
        return dataset.lengths[~dataset.is_done][:: dataset.n_processes]

    def __iter__(self) -> Iterator[Batch]:
        blocks = start_workers(self.blocks)  # not in the prefetch thread, because it may fork
        return prefetch(self._batches(blocks), BATCHES_AHEAD)

    def _batches(self, blocks: Iterator[CellBlock]) -> Iterator[Batch]:
        for block in blocks:
            for batch in make_batches(block, self.limits, self.pad, self.seq_len, self.min_positions):
                yield batch.pinned() if self.pin_memory else batch


def identity(block: Any) -> Any:
    """Return `block`; a `collate_fn` for datasets that already yield batches."""
    return block


def make_batches(
    block: CellBlock, limits: BatchLimits, pad: int, seq_len: int, min_positions: int = 0
) -> Iterator[Batch]:
    """Split a block into padded batches of cells of similar length, longest first."""
    for cells in group_by_length(block.tokens.lengths, limits, seq_len, min_positions):
        genes, counts = pad_to_common_length(block.tokens.take(cells), pad, seq_len, min_positions)
        arrays = block.rows[cells], genes, counts, block.aux_tokens[cells]
        yield Batch(*map(torch.from_numpy, arrays))


def group_by_length(
    lengths: np.ndarray, limits: BatchLimits, seq_len: int, min_positions: int = 0
) -> Iterator[np.ndarray]:
    """Yield the indices of the cells of each batch, longest cells first, as many as the limits allow.

    Parameters
    ----------
    lengths
        Number of genes of each cell (cells,).
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        n_positions = positions(int(lengths[order[start]]), seq_len, min_positions)
        size = min(limits.max_cells, max(1, limits.max_tokens // n_positions))
        yield order[start : start + size]
        start += size


def positions(longest: int, seq_len: int, min_positions: int = 0) -> int:
    """Return the padded length of a batch whose longest cell has `longest` genes.

    One position is added for [START]. The length is rounded up to a multiple of `LENGTH_MULTIPLE` and limited to
    `seq_len`.
    """
    return min(-(-max(longest + 1, min_positions) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, seq_len)


def pad_to_common_length(
    tokens: Tokens, pad: int, seq_len: int, min_positions: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Pad gene tokens, int64, and counts, float32, to (cells, positions) arrays."""
    lengths = tokens.lengths
    width = positions(int(lengths.max(initial=0)), seq_len, min_positions)
    is_gene = np.arange(width) < lengths[:, None]  # (cells, positions)
    genes = np.full(is_gene.shape, pad, dtype=np.int64)
    counts = np.zeros(is_gene.shape, dtype=np.float32)
    genes[is_gene], counts[is_gene] = tokens.genes, tokens.counts
    return genes, counts
