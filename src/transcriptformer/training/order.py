"""In which order the cells of an epoch are learned from: a pure function of the seed.

The blocks of all sources are shuffled and laid end to end, and their cells are dealt out to streams, long stretches of
equal length. Each stream is cut into windows of many blocks, whose cells are shuffled with each other; a step takes as
many cells of every stream. Neither processes nor workers change the order: they share out the streams.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from transcriptformer.errors import DataError

_BLOCKS, _EPOCH, _WINDOW, _GENES = range(4)
"""What a random generator is for; beside the seed and where it is used, so that no two are alike."""


class Piece(NamedTuple):
    """Cells that are read at once.

    Attributes
    ----------
    source
        Number of their source.
    cells
        Where they stand there (cells,), ascending.
    rows
        Where they stand among the cells of all sources (cells,).
    seed
        For the order of their genes.
    """

    source: int
    cells: np.ndarray
    rows: np.ndarray
    seed: int


class Blocks:
    """Blocks of consecutive cells, cut from several sources; those without a wanted cell are left out.

    Parameters
    ----------
    n_cells
        Cells of each source.
    is_wanted
        Which of all cells are to be learned from, source after source (cells,).
    block_size
        Most cells of a block.
    """

    def __init__(self, n_cells: Sequence[int], is_wanted: np.ndarray, block_size: int) -> None:
        self.is_wanted = is_wanted
        self.first_rows = np.concatenate([[0], np.cumsum(n_cells)])
        starts = [np.arange(0, n, block_size) for n in n_cells]
        source = np.repeat(np.arange(len(n_cells)), [len(s) for s in starts])
        first = np.concatenate(starts) + self.first_rows[source]  # (blocks,), as rows of all cells
        stop = np.minimum(first + block_size, self.first_rows[source + 1])
        n_wanted = np.concatenate([[0], np.cumsum(is_wanted)])
        size = n_wanted[stop] - n_wanted[first]
        self.source, self.first, self.stop, self.size = (a[size > 0] for a in (source, first, stop, size))

    def piece(self, block: int, start: int, stop: int, seed: int) -> Piece:
        """The wanted cells of a block from the `start`-th to before the `stop`-th."""
        first, source = self.first[block], int(self.source[block])
        rows = first + np.flatnonzero(self.is_wanted[first : self.stop[block]])[start:stop]
        return Piece(source, rows - self.first_rows[source], rows, seed)


class Epoch(NamedTuple):
    """The blocks of one epoch, in order.

    Attributes
    ----------
    number
        From 0.
    blocks
        Block of each visit (visits,); one may be visited more than once, or not at all.
    ends
        Cells of the epoch up to the end of each visit (visits,).
    """

    number: int
    blocks: np.ndarray
    ends: np.ndarray

    @property
    def n_cells(self) -> int:
        """Cells of all visits."""
        return int(self.ends[-1]) if len(self.ends) else 0


class Epochs:
    """The order of training.

    Parameters
    ----------
    blocks
        Where the cells are.
    weights
        Passes over each source in an epoch. With a fraction, an epoch goes on in the shuffled source where the one
        before it stopped.
    n_streams, window_size
        Streams, and cells of a stream that are shuffled with each other.
    batch_size
        Most cells in a step; no fewer than streams.
    seed
        Decides about everything.

    Raises
    ------
    DataError
        When an epoch is asked for that has fewer cells than there are streams.
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
        """Steps of an epoch: as few as the batch size allows, such that every stream has a cell in each."""
        n_cells = self._n_cells(epoch)
        return min(-(-n_cells // self.batch_size), n_cells // self.n_streams)

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch of a step, both counted from 0, and which of the epoch's steps it is."""
        epoch = 0
        while step >= (n_steps := self.n_steps(epoch)):
            step -= n_steps
            epoch += 1
        return epoch, step

    def cells_of_steps(self, epoch: int, stream: int) -> np.ndarray:
        """Where each step of an epoch begins and ends in a stream (steps + 1,).

        The cells of all streams, taken in turn, are cut into steps that have as many cells, or one less.
        """
        n_steps = self.n_steps(epoch)
        bounds = np.arange(n_steps + 1) * self._n_cells(epoch) // n_steps
        return (bounds - stream + self.n_streams - 1) // self.n_streams

    def window_of(self, stream: int, cell: int) -> int:
        """Number of the window that a cell of a stream is in.

        The first windows of the streams are of different sizes, so that not all streams read at the same step.
        """
        return (cell + self._shift(stream)) // self.window_size

    def window(self, epoch: int, stream: int, number: int) -> tuple[int, np.ndarray, list[Piece]]:
        """Which cell of the stream a window begins with, how its cells are shuffled, and from where they are read."""
        first, stop = self._stream(epoch, stream)
        start = number * self.window_size - self._shift(stream)
        end = min(start + self.window_size, stop - first)
        start = max(start, 0)
        order = self._random(_WINDOW, epoch, stream, number).permutation(end - start)
        return start, order, list(self._pieces(self._epoch(epoch), first + start, first + end))

    def _shift(self, stream: int) -> int:
        return self.window_size * stream // self.n_streams

    def _stream(self, epoch: int, stream: int) -> tuple[int, int]:
        """First and last cell of a stream, in the order of the visits; streams are of one length, or one less."""
        length, n_longer = divmod(self._n_cells(epoch), self.n_streams)
        first, stop = (i * length + min(i, n_longer) for i in (stream, stream + 1))
        return first, stop

    def _pieces(self, epoch: Epoch, start: int, stop: int) -> Iterator[Piece]:
        visit = int(np.searchsorted(epoch.ends, start, side="right"))
        while start < stop:
            block, end = epoch.blocks[visit], int(epoch.ends[visit])
            before = end - int(self.blocks.size[block])
            seed = int(self._random(_GENES, epoch.number, visit).integers(2**31))
            yield self.blocks.piece(block, start - before, min(stop, end) - before, seed)
            start, visit = end, visit + 1

    def _epoch(self, number: int) -> Epoch:
        if self._latest is None or self._latest.number != number:
            visits = [self._visits(source, weight, number) for source, weight in enumerate(self.weights)]
            blocks = self._random(_EPOCH, number).permutation(np.concatenate(visits))
            self._latest = Epoch(number, blocks, np.cumsum(self.blocks.size[blocks]))
        return self._latest

    def _n_cells(self, epoch: int) -> int:
        """Cells of an epoch; with whole passes over every source the same in all."""
        place = 0 if all(weight == int(weight) for weight in self.weights) else epoch
        if place not in self._sizes:
            n_cells = self._sizes[place] = self._epoch(place).n_cells
            if n_cells < self.n_streams:
                raise DataError(
                    f"{n_cells} cells to learn from in an epoch are fewer than training.streams={self.n_streams}; "
                    "give more cells, or a lower number there"
                )
        return self._sizes[place]

    def _visits(self, source: int, weight: float, epoch: int) -> np.ndarray:
        """Blocks of a source that are visited in an epoch: a stretch of endless passes, each in an order of its own."""
        blocks = np.flatnonzero(self.blocks.source == source)
        visits = np.arange(int(epoch * weight * len(blocks)), int((epoch + 1) * weight * len(blocks)))
        passes = visits // max(1, len(blocks))
        orders = {p: self._random(_BLOCKS, source, p).permutation(blocks) for p in np.unique(passes).tolist()}
        return np.array([orders[p][v % len(blocks)] for p, v in zip(passes.tolist(), visits, strict=True)], np.int64)

    def _random(self, *place: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *place])
