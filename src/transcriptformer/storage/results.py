"""Intermediate results: sealed, immutable pieces, so that a killed run loses a few seconds of work and nothing else.

Each flush writes one file with some rows and all their fields. A piece is whole or not there: pieces depend neither on
each other nor on their order.
"""

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transcriptformer.errors import DamagedError, OutputError
from transcriptformer.storage.atomic import remove
from transcriptformer.storage.sealed import SealedFile, write_sealed

logger = logging.getLogger(__name__)

ROWS, N_GENES, LABEL, LABEL_PROBABILITY = "rows", "n_genes", "label", "label_probability"
"""Names of results that more than one place knows."""

PIECES = "piece-*.safetensors"
"""Names of the pieces in a folder."""

RUN = "run"
"""Metadata of a piece: the run that it belongs to."""

SECONDS_AT_RISK = 5.0
"""Results wait in memory for this long at most."""

BYTES_AT_RISK = 2**25
"""And no more than this many bytes of them."""

_GAP = 4096
"""Records that are read along, and left out, rather than read two stretches."""


class Field(NamedTuple):
    """One kind of result.

    Attributes
    ----------
    dtype
        NumPy's name of its type.
    width
        Numbers in a record; 0: the record is one number, without an axis of its own.
    per_gene
        Whether each gene of a cell has a record, rather than each cell.
    """

    dtype: str
    width: int = 0
    per_gene: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a record."""
        return (self.width,) if self.width else ()

    @property
    def record_bytes(self) -> int:
        """Size of a record."""
        return np.dtype(self.dtype).itemsize * max(1, self.width)


Layout = Mapping[str, Field]
"""The results there are, by name."""


class PieceWriter:
    """Writes the results of one process as pieces.

    Parameters
    ----------
    folder
        Of the pieces; it exists.
    process
        Number of the process.
    layout
        The results there are; the rows come with them.
    run
        The run that they belong to.
    """

    def __init__(self, folder: Path, process: int, layout: Layout, run: str) -> None:
        self.folder, self.run = folder, run
        self.layout = {ROWS: Field("int64"), **layout}
        self.stem, self.n_pieces = f"piece-{process:05}-{secrets.token_hex(4)}", 0
        self.waiting: dict[str, list[np.ndarray]] = {name: [] for name in self.layout}
        self.n_bytes, self.last_flush = 0, time.monotonic()
        self.failure: Exception | None = None

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Take the results of a batch, by name of the field.

        Raises
        ------
        OutputError
            If a piece cannot be written, now or earlier.
        """
        if self.failure is not None:
            raise self.failure
        try:
            arrays = {name: np.ascontiguousarray(values[name], field.dtype) for name, field in self.layout.items()}
            _check_lengths(arrays, self.layout)
        except Exception as error:  # such as a lack of memory: batches that come later must not take its place
            self.failure = error
            raise
        for name, array in arrays.items():
            self.waiting[name].append(array)
            self.n_bytes += array.nbytes
        if self.n_bytes > BYTES_AT_RISK or time.monotonic() - self.last_flush > SECONDS_AT_RISK:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a piece, and see it safely on disk.

        Raises
        ------
        OutputError
            If it cannot be written, now or earlier; earlier pieces stay.
        """
        if self.failure is not None:
            raise self.failure
        if self.waiting[ROWS]:
            path = self.folder / f"{self.stem}-{self.n_pieces:06}.safetensors"
            try:
                write_sealed(path, self.waiting, {RUN: self.run})
            except OutputError as error:
                self.failure = cannot_keep(self.folder, error)
                raise self.failure from error
            except Exception as error:  # such as a lack of memory
                self.failure = error
                raise
            finally:
                self.waiting = {name: [] for name in self.layout}
            self.n_pieces += 1
        self.n_bytes, self.last_flush = 0, time.monotonic()


def _check_lengths(arrays: Mapping[str, np.ndarray], layout: Layout) -> None:
    n_rows = len(arrays[ROWS])
    n_genes = int(arrays[N_GENES].sum()) if N_GENES in arrays else 0
    lengths = {name: len(array) for name, array in arrays.items()}
    if lengths != {name: n_genes if field.per_gene else n_rows for name, field in layout.items()}:
        raise AssertionError(f"results of {n_rows} cells and {n_genes} genes have lengths {lengths}")


def cannot_keep(folder: Path, error: OutputError) -> OutputError:
    """What to say where results cannot be written."""
    return OutputError(
        f"{folder}: results cannot be written ({cause_of(error)}); what is there is kept: "
        "make room, then run the same command with --resume"
    )


def cause_of(error: OutputError) -> str:
    """Why the operating system would not write, in its words."""
    cause = error.__cause__
    return str((isinstance(cause, OSError) and cause.strerror) or error)


def kept_pieces(folder: Path, run: str) -> list[SealedFile]:
    """Pieces of this run, each verified; others are told of and deleted, if they can be.

    Raises
    ------
    OutputError
        If one cannot be read, which does not say that it is damaged.
    """
    files = []
    for path in sorted(folder.glob(PIECES)):
        try:
            file = open_of_run(path, run)
            file.verify()
            files.append(file)
        except DamagedError as error:
            drop(path, str(error))
    return files


def open_pieces(folder: Path) -> list[SealedFile]:
    """All pieces, unverified: enough to count what is there."""
    return [SealedFile(path) for path in sorted(folder.glob(PIECES))]


def open_of_run(path: Path, run: str) -> SealedFile:
    """Open what a run has kept; DamagedError if it is of another run."""
    file = SealedFile(path)
    if file.metadata.get(RUN) != run:
        raise DamagedError(f"{path}: of another run")
    return file


def drop(path: Path, problem: str) -> None:
    """Say that a file is not used, and why, and delete it, if that is possible."""
    logger.warning("%s; its results are computed again", problem)
    remove(path)


class Pieces:
    """Reads pieces as one table, in the order of rows.

    Parameters
    ----------
    files
        The pieces; see `kept_pieces`.
    layout
        The results there are.

    Attributes
    ----------
    rows
        Rows that are there, ascending, each once.
    n_genes
        Genes of each of them with a record of their own (rows,).
    """

    def __init__(self, files: Sequence[SealedFile], layout: Layout) -> None:
        self.files, self.layout = files, layout
        rows = [file.read(ROWS) for file in self.files]
        lengths = [len(part) for part in rows]
        piece = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
        place = np.concatenate([np.arange(n) for n in lengths]) if rows else np.zeros(0, np.int64)
        self.rows, first = np.unique(np.concatenate(rows) if rows else place, return_index=True)
        self.piece, self.place = piece[first], place[first]
        self.n_genes = np.zeros(len(self.rows), np.int32)
        if N_GENES in layout and self.files:
            counts = [file.read(N_GENES) for file in self.files]
            starts = [np.cumsum(count, dtype=np.int64) - count for count in counts]
            self.n_genes, self.first_gene = np.concatenate(counts)[first], np.concatenate(starts)[first]

    @property
    def n_bytes(self) -> int:
        """Size of all results."""
        n_genes = int(self.n_genes.sum())
        fields = self.layout.values()
        return sum(field.record_bytes * (n_genes if field.per_gene else len(self.rows)) for field in fields)

    def is_done(self, n_rows: int) -> np.ndarray:
        """Mask (n_rows,) of the rows that are there."""
        done = np.zeros(n_rows, bool)
        done[self.rows] = True
        return done

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Records of the rows from `start` to before `stop`, in order, for a field that each cell has once."""
        return self._gather(name, self.piece[start:stop], self.place[start:stop])

    def read_genes(self, name: str, start: int, stop: int) -> np.ndarray:
        """The same for a field that each gene of a cell has: cell after cell."""
        lengths = self.n_genes[start:stop]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = np.repeat(self.first_gene[start:stop], lengths) + within
        return self._gather(name, np.repeat(self.piece[start:stop], lengths), places)

    def _gather(self, name: str, pieces: np.ndarray, places: np.ndarray) -> np.ndarray:
        field = self.layout[name]
        values = np.empty((len(places), *field.shape), field.dtype)
        for i in np.unique(pieces):
            here = np.flatnonzero(pieces == i)
            _read_records(self.files[i], name, places[here], values, here)
        return values


def _read_records(file: SealedFile, name: str, places: np.ndarray, values: np.ndarray, into: np.ndarray) -> None:
    """Put records at `places`, which lie close together for the most part, into `values`: few contiguous reads."""
    order = np.argsort(places)
    cuts = 1 + np.flatnonzero(np.diff(places[order]) > _GAP)
    for start, stop in pairwise([0, *cuts, len(places)]):
        chosen = order[start:stop]
        first, last = int(places[chosen[0]]), int(places[chosen[-1]])
        span = file.read_rows(name, first, last + 1)
        values[into[chosen]] = span[places[chosen] - first]
