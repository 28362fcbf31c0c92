"""The training cells as a stream of steps, each a list of batches of cells of similar length."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from transcriptformer.data.batches import Batch, BatchLimits, identity, make_batches
from transcriptformer.data.prefetch import prefetch
from transcriptformer.data.reader import CellBlock, CellReader
from transcriptformer.data.tokenize import Tokens
from transcriptformer.data.workers import shard_of_worker, start_workers
from transcriptformer.training.order import Epochs, Piece

PREFETCHED_STEPS = 4
"""Number of steps that are prepared in advance."""


class TrainingDataset(IterableDataset[CellBlock]):
    """One process's share of the shuffled cells, step by step.

    Each worker serves some of the streams of its process. A step consists of one item from each worker.

    Parameters
    ----------
    readers
        Readers of the sources.
    epochs
        Order of the cells.
    steps
        Steps to yield.
    process, n_processes
        Index of this process, and number of processes.
    """

    def __init__(
        self, readers: Sequence[CellReader], epochs: Epochs, steps: range, process: int = 0, n_processes: int = 1
    ) -> None:
        self.readers, self.epochs, self.steps = readers, epochs, steps
        self.process, self.n_processes = process, n_processes

    def __iter__(self) -> Iterator[CellBlock]:
        shard, n_shards = shard_of_worker(self.process, self.n_processes)
        n_streams = self.epochs.n_streams
        streams = range(shard * n_streams // n_shards, (shard + 1) * n_streams // n_shards)
        n_left = len(self.steps)
        if n_left == 0:
            return
        epoch, first_step = self.epochs.locate(self.steps.start)
        while n_left > 0:
            of_streams = [self._steps(epoch, stream, first_step) for stream in streams]
            for parts in zip(*of_streams, strict=True):
                if n_left == 0:
                    return
                yield join(parts)
                n_left -= 1
            epoch, first_step = epoch + 1, 0

    def _steps(self, epoch: int, stream: int, first_step: int) -> Iterator[CellBlock]:
        """Yield the cells of one stream, step by step."""
        number, begin, window = -1, 0, None
        for start, stop in pairwise(self.epochs.cells_of_steps(epoch, stream)[first_step:].tolist()):
            parts = []
            while start < stop:
                if window is None or self.epochs.window_of(stream, start) != number:
                    number = self.epochs.window_of(stream, start)
                    begin, order, pieces = self.epochs.window(epoch, stream, number)
                    window = take(join([self._read(piece) for piece in pieces]), order)
                end = min(stop, begin + len(window.rows))
                parts.append(take(window, np.arange(start - begin, end - begin)))
                start = end
            yield join(parts)

    def _read(self, piece: Piece) -> CellBlock:
        reader = self.readers[piece.source].with_seed(piece.seed)
        return reader.block(int(piece.cells[0]), piece.cells, piece.rows)


def join(parts: Sequence[CellBlock]) -> CellBlock:
    """Concatenate blocks of cells."""
    if len(parts) == 1:
        return parts[0]
    tokens = Tokens.join([part.tokens for part in parts])
    return CellBlock(np.concatenate([p.rows for p in parts]), tokens, np.concatenate([p.aux_tokens for p in parts]))


def take(block: CellBlock, cells: np.ndarray) -> CellBlock:
    """Select cells of a block by index (cells,)."""
    return CellBlock(block.rows[cells], block.tokens.take(cells), block.aux_tokens[cells])


class StepLoader:
    """Splits the steps of a dataset into batches; a background thread prepares the next steps.

    Parameters
    ----------
    dataset
        Cells of each step.
    limits
        Limits of a batch.
    pad
        Padding token.
    seq_len
        Maximum positions per cell.
    n_workers
        Number of reader processes; 0: read in this process.
    pin_memory
        Copy batches to pinned memory, for faster transfer to a GPU.
    """

    def __init__(
        self,
        dataset: TrainingDataset,
        limits: BatchLimits,
        pad: int,
        seq_len: int,
        n_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.limits, self.pad, self.seq_len, self.pin_memory = limits, pad, seq_len, pin_memory
        self.n_parts = max(1, n_workers)
        self.parts: DataLoader[CellBlock] = DataLoader(
            dataset, batch_size=None, collate_fn=identity, num_workers=n_workers
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        parts = start_workers(self.parts)  # may start processes, which the prefetch thread must not
        return prefetch(self._steps(parts), PREFETCHED_STEPS)

    def _steps(self, parts: Iterator[CellBlock]) -> Iterator[list[Batch]]:
        for first in parts:
            step = join([first, *(next(parts) for _ in range(self.n_parts - 1))])
            batches = make_batches(step, self.limits, self.pad, self.seq_len)
            yield [batch.pinned() if self.pin_memory else batch for batch in batches]
