"""The order of the training cells, a pure function of the seed.

The blocks of all sources are shuffled and concatenated, and the result is split into contiguous streams of equal
length. Each stream is split into windows of many blocks, and cells are shuffled within a window. A step takes equally
many cells from every stream. The order does not depend on the number of processes or workers, which share the streams.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from transcriptformer.errors import DataError

_BLOCKS, _EPOCH, _WINDOW, _GENES = range(4)
"""Keys that make the random generators independent of each other."""


class Piece(NamedTuple):
    """Cells that are read together.

    Attributes
    ----------
    source
        Index of their source.
    cells
        Indices in the source (cells,), ascending.
    rows
        Indices among the cells of all sources (cells,).
    seed
        Seed for the order of their genes.
    """

    source: int
    cells: np.ndarray
    rows: np.ndarray
    seed: int


class Blocks:
    """Blocks of consecutive cells of several sources; blocks without a training cell are dropped.

    Parameters
    ----------
    n_cells
        Number of cells of each source.
    is_training
        Mask of the training cells, over all sources (cells,).
    block_size
        Maximum number of cells per block.
    """

    def __init__(self, n_cells: Sequence[int], is_training: np.ndarray, block_size: int) -> None:
        self.is_training = is_training
        self.first_rows = np.concatenate([[0], np.cumsum(n_cells)])
        starts = [np.arange(0, n, block_size) for n in n_cells]
        source = np.repeat(np.arange(len(n_cells)), [len(s) for s in starts])
        first = np.concatenate(starts) + self.first_rows[source]  # (blocks,), as rows of all cells
        stop = np.minimum(first + block_size, self.first_rows[source + 1])
        cumulative = np.concatenate([[0], np.cumsum(is_training)])
        size = cumulative[stop] - cumulative[first]
        self.source, self.first, self.stop, self.size = (a[size > 0] for a in (source, first, stop, size))

    def piece(self, block: int, start: int, stop: int, seed: int) -> Piece:
        """Return the training cells `start` to `stop` (exclusive) of a block."""
        first, source = self.first[block], int(self.source[block])
        rows = first + np.flatnonzero(self.is_training[first : self.stop[block]])[start:stop]
        return Piece(source, rows - self.first_rows[source], rows, seed)


class Epoch(NamedTuple):
    """The blocks of one epoch, in order.

    Attributes
    ----------
    number
        Index of the epoch.
    blocks
        Block of each visit (visits,); a block may occur several times, or not at all.
    ends
        Cumulative number of cells at the end of each visit (visits,).
    """

    number: int
    blocks: np.ndarray
    ends: np.ndarray

    @property
    def n_cells(self) -> int:
        """Number of cells of the epoch."""
        return int(self.ends[-1]) if len(self.ends) else 0


class Epochs:
    """The order of the cells in every epoch.

    Parameters
    ----------
    blocks
        Blocks of the training cells.
    weights
        Passes over each source per epoch. If fractional, an epoch continues in the shuffled source where the previous
        one stopped.
    n_streams, window_size
        Number of streams, and number of consecutive cells of a stream that are shuffled together.
    batch_size
        Maximum cells per step, at least the number of streams.
    seed
        Seed of the order.

    Raises
    ------
    DataError
        By all methods, if an epoch has fewer cells than there are streams.
    """

    def __init__(
        self,
        blocks: Blocks,
        weights: Sequence[float],
        n_streams: int,
        window_size: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.blocks, self.weights, self.seed = blocks, weights, seed
        self.n_streams, self.window_size = n_streams, window_size
        self.batch_size = batch_size
        self._latest: Epoch | None = None
        self._sizes: dict[int, int] = {}

    def n_steps(self, epoch: int) -> int:
        """Return the number of steps: as few as the batch size allows, with a cell of every stream in each."""
        n_cells = self._n_cells(epoch)
        return min(-(-n_cells // self.batch_size), n_cells // self.n_streams)

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step and its index in that epoch, all counted from 0."""
        epoch = 0
        while step >= (n_steps := self.n_steps(epoch)):
            step -= n_steps
            epoch += 1
        return epoch, step

    def cells_of_steps(self, epoch: int, stream: int) -> np.ndarray:
        """Return the boundaries of an epoch's steps in a stream (steps + 1,).

        The cells of all streams, taken in turn, are split into steps whose sizes differ by at most one.
        """
        n_steps = self.n_steps(epoch)
        bounds = np.arange(n_steps + 1) * self._n_cells(epoch) // n_steps
        return (bounds - stream + self.n_streams - 1) // self.n_streams

    def window_of(self, stream: int, cell: int) -> int:
        """Return the index of the window that contains a cell of a stream.

        The first windows differ in size, so that the streams do not all read at the same step.
        """
        return (cell + self._shift(stream)) // self.window_size

    def window(self, epoch: int, stream: int, number: int) -> tuple[int, np.ndarray, list[Piece]]:
        """Return the first cell of a window in the stream, the permutation of its cells, and the pieces to read."""
        first, stop = self._stream(epoch, stream)
        start = number * self.window_size - self._shift(stream)
        end = min(start + self.window_size, stop - first)
        start = max(start, 0)
        order = self._rng(_WINDOW, epoch, stream, number).permutation(end - start)
        return start, order, list(self._pieces(self._epoch(epoch), first + start, first + end))

    def _shift(self, stream: int) -> int:
        return self.window_size * stream // self.n_streams

    def _stream(self, epoch: int, stream: int) -> tuple[int, int]:
        """Return the start and stop of a stream, in visit order; lengths differ by at most one."""
        length, n_longer = divmod(self._n_cells(epoch), self.n_streams)
        first, stop = (i * length + min(i, n_longer) for i in (stream, stream + 1))
        return first, stop

    def _pieces(self, epoch: Epoch, start: int, stop: int) -> Iterator[Piece]:
        visit = int(np.searchsorted(epoch.ends, start, side="right"))
        while start < stop:
            block, end = epoch.blocks[visit], int(epoch.ends[visit])
            before = end - int(self.blocks.size[block])
            seed = int(self._rng(_GENES, epoch.number, visit).integers(2**31))
            yield self.blocks.piece(block, start - before, min(stop, end) - before, seed)
            start, visit = end, visit + 1

    def _epoch(self, number: int) -> Epoch:
        if self._latest is None or self._latest.number != number:
            visits = [self._visits(source, weight, number) for source, weight in enumerate(self.weights)]
            blocks = self._rng(_EPOCH, number).permutation(np.concatenate(visits))
            self._latest = Epoch(number, blocks, np.cumsum(self.blocks.size[blocks]))
        return self._latest

    def _n_cells(self, epoch: int) -> int:
        """Return the number of cells of an epoch, which is constant if all weights are integers."""
        key = 0 if all(weight == int(weight) for weight in self.weights) else epoch
        if key not in self._sizes:
            n_cells = self._sizes[key] = self._epoch(key).n_cells
            if n_cells < self.n_streams:
                raise DataError(
                    f"an epoch has {n_cells} training cells, fewer than training.streams={self.n_streams}; "
                    "add cells or lower training.streams"
                )
        return self._sizes[key]

    def _visits(self, source: int, weight: float, epoch: int) -> np.ndarray:
        """Return the blocks of a source in an epoch: a slice of endless passes, each shuffled separately."""
        blocks = np.flatnonzero(self.blocks.source == source)
        visits = np.arange(int(epoch * weight * len(blocks)), int((epoch + 1) * weight * len(blocks)))
        passes = visits // max(1, len(blocks))
        orders = {p: self._rng(_BLOCKS, source, p).permutation(blocks) for p in np.unique(passes).tolist()}
        return np.array([orders[p][v % len(blocks)] for p, v in zip(passes.tolist(), visits, strict=True)], np.int64)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])
