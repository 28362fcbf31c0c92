"""The cells of one or several sources as a stream of batches, of cells of like length, at their own length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from transcriptformer.data.reader import CellReader
from transcriptformer.data.survey import Survey
from transcriptformer.data.tokenize import Tokens

LENGTH_MULTIPLE = 16
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


@dataclass(frozen=True)
class BatchLimits:
    """How large a batch may be."""

    max_cells: int
    """Most cells."""
    max_tokens: int
    """Most positions, padding included; a single cell may have more."""


class CellDataset(IterableDataset[Batch]):
    """The kept cells of several sources, as a stream of batches.

    The stream runs over blocks of consecutive cells. A block is read at once, and its cells form batches by length, so
    that little is spent on padding: within a block, batches do not follow the order of the file; `Batch.rows` tells
    where each cell belongs. Blocks are dealt out to processes and their workers in turn.

    Parameters
    ----------
    readers
        The sources, in order.
    survey
        What was found in them.
    pad
        Token after a cell's last gene.
    seq_len
        Most genes of a cell.
    limits
        Of a batch.
    block_size
        Most cells that are read at once.
    min_positions
        Pad every cell to at least this many positions.
    """

    def __init__(
        self,
        readers: Sequence[CellReader],
        survey: Survey,
        pad: int,
        seq_len: int,
        limits: BatchLimits,
        block_size: int,
        min_positions: int = 0,
    ) -> None:
        self.readers, self.kept = readers, survey.kept
        self.pad, self.seq_len, self.limits, self.min_positions = pad, seq_len, limits, min_positions
        self.block_size, self.n_kept = block_size, survey.n_kept
        self.is_done = np.zeros(self.n_kept, bool)
        self.process, self.n_processes = 0, 1

    def deal_out(self, process: int, n_processes: int, is_done: np.ndarray) -> None:
        """Serve one process of several, and leave out rows whose results are there, `is_done` (kept cells,)."""
        self.process, self.n_processes, self.is_done = process, n_processes, is_done

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, n_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        shard, n_shards = self.process * n_workers + number, self.n_processes * n_workers
        # Small inputs are cut into smaller blocks, so that every process and worker has some.
        block_size = (
            min(self.block_size, max(1, -(-self.n_kept // (2 * n_shards)))) if n_shards > 1 else self.block_size
        )
        for i, block in enumerate(_blocks(self.readers, self.kept, block_size)):
            if i % n_shards == shard:
                todo = ~self.is_done[block.rows]
                if todo.any():
                    yield from self._batches(block.reader, block.start, block.cells[todo], block.rows[todo])

    def _batches(self, reader: CellReader, start: int, cells: np.ndarray, rows: np.ndarray) -> Iterator[Batch]:
        tokens = reader.tokens(start, cells)
        aux_tokens = reader.aux_tokens(start, int(cells[-1]) + 1)[cells - start]
        for chosen in group_by_length(tokens.lengths, self.limits, self.seq_len, self.min_positions):
            genes, counts = pad_to_common_length(tokens.take(chosen), self.pad, self.seq_len, self.min_positions)
            yield Batch(
                rows=torch.from_numpy(rows[chosen]),
                gene_tokens=torch.from_numpy(genes),
                gene_counts=torch.from_numpy(counts),
                aux_tokens=torch.from_numpy(aux_tokens[chosen]),
            )


class _Block(NamedTuple):
    """Consecutive cells of a source: those kept, by their index there, and their rows among all kept cells."""

    reader: CellReader
    start: int
    cells: np.ndarray
    rows: np.ndarray


def _blocks(readers: Sequence[CellReader], kept: np.ndarray, block_size: int) -> Iterator[_Block]:
    first_cell = first_row = 0
    for reader in readers:
        for start in range(0, len(reader), block_size):
            stop = min(start + block_size, len(reader))
            cells = start + np.flatnonzero(kept[first_cell + start : first_cell + stop])
            yield _Block(reader, start, cells, first_row + np.arange(len(cells)))
            first_row += len(cells)
        first_cell += len(reader)


def as_is(batch: Any) -> Any:
    """The `collate_fn` for a `CellDataset`, whose batches are complete."""
    return batch


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
