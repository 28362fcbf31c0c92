"""Intermediate results in immutable files (pieces) with checksums; a killed run loses only seconds of work.

Each flush atomically writes one piece: some rows with all their fields. Pieces are independent, in any order.
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
"""Names of result fields that several modules use."""

PIECES = "piece-*.safetensors"
"""Glob pattern of piece files."""

RUN = "run"
"""Metadata key of a piece: id of its run."""

FLUSH_SECONDS = 5.0
"""Flush when buffered results are older than this."""

FLUSH_BYTES = 2**25
"""Flush when more than this many bytes are buffered."""

_GAP = 4096
"""Maximum gap between records to read in one go rather than in two reads."""


class Field(NamedTuple):
    """One kind of result.

    Attributes
    ----------
    dtype
        NumPy dtype name.
    width
        Numbers per record; 0: a scalar.
    per_gene
        Whether there is one record per gene of a cell, rather than per cell.
    of_genes
        Whether a record summarizes a cell's genes, and so is NaN for a cell without genes.
    may_be_missing
        Whether numbers may be NaN in any cell, which means that they do not exist; they are never infinite.
    """

    dtype: str
    width: int = 0
    per_gene: bool = False
    of_genes: bool = False
    may_be_missing: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one record."""
        return (self.width,) if self.width else ()

    @property
    def record_bytes(self) -> int:
        """Size of one record in bytes."""
        return np.dtype(self.dtype).itemsize * max(1, self.width)


Layout = Mapping[str, Field]
"""Fields by name."""


class PieceWriter:
    """Write the results of one process as pieces.

    Parameters
    ----------
    folder
        Existing folder for the pieces.
    process
        Number of the process.
    layout
        Fields of the results; `ROWS` is added.
    run
        Id of the run.
    """

    def __init__(self, folder: Path, process: int, layout: Layout, run: str) -> None:
        self.folder, self.run = folder, run
        self.layout = {ROWS: Field("int64"), **layout}
        self.stem, self.n_pieces = f"piece-{process:05}-{secrets.token_hex(4)}", 0
        self.buffer: dict[str, list[np.ndarray]] = {name: [] for name in self.layout}
        self.n_bytes, self.last_flush = 0, time.monotonic()
        self.failure: Exception | None = None

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Buffer the results of a batch, by field name, and flush if due.

        Raises
        ------
        OutputError
            If writing a piece fails, or failed before.
        """
        if self.failure is not None:
            raise self.failure
        try:
            arrays = {name: np.ascontiguousarray(values[name], field.dtype) for name, field in self.layout.items()}
            _check_lengths(arrays, self.layout)
        except Exception as error:  # such as MemoryError; later batches must not be stored in its place
            self.failure = error
            raise
        for name, array in arrays.items():
            self.buffer[name].append(array)
            self.n_bytes += array.nbytes
        if self.n_bytes > FLUSH_BYTES or time.monotonic() - self.last_flush > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the buffered results as a piece and sync it to disk.

        Raises
        ------
        OutputError
            If writing a piece fails, or failed before; earlier pieces stay.
        """
        if self.failure is not None:
            raise self.failure
        if self.buffer[ROWS]:
            path = self.folder / f"{self.stem}-{self.n_pieces:06}.safetensors"
            try:
                write_sealed(path, self.buffer, {RUN: self.run})
            except OutputError as error:
                self.failure = cannot_write_results(self.folder, error)
                raise self.failure from error
            except Exception as error:  # such as MemoryError
                self.failure = error
                raise
            finally:
                self.buffer = {name: [] for name in self.layout}
            self.n_pieces += 1
        self.n_bytes, self.last_flush = 0, time.monotonic()


def _check_lengths(arrays: Mapping[str, np.ndarray], layout: Layout) -> None:
    n_rows = len(arrays[ROWS])
    n_genes = int(arrays[N_GENES].sum()) if N_GENES in arrays else 0
    lengths = {name: len(array) for name, array in arrays.items()}
    if lengths != {name: n_genes if field.per_gene else n_rows for name, field in layout.items()}:
        raise AssertionError(f"results of {n_rows} cells and {n_genes} genes have lengths {lengths}")


def cannot_write_results(folder: Path, error: OutputError) -> OutputError:
    """Create the error for results that cannot be written."""
    return OutputError(
        f"{folder}: results cannot be written ({_reason(error)}); results so far are kept; "
        "free up space, then rerun the same command with --resume"
    )


def _reason(error: OutputError) -> str:
    """Return the operating system's reason for a failed write."""
    cause = error.__cause__
    return str((isinstance(cause, OSError) and cause.strerror) or error)


def verified_pieces(folder: Path, run: str) -> list[SealedFile]:
    """Return the verified pieces of this run; log and delete damaged pieces and those of other runs.

    Raises
    ------
    OutputError
        If a piece cannot be read, which does not mean that it is damaged.
    """
    files = []
    for path in sorted(folder.glob(PIECES)):
        try:
            file = open_for_run(path, run)
            file.verify()
            files.append(file)
        except DamagedError as error:
            discard(path, str(error))
    return files


def open_pieces(folder: Path) -> list[SealedFile]:
    """Return all pieces without verifying them."""
    return [SealedFile(path) for path in sorted(folder.glob(PIECES))]


def open_for_run(path: Path, run: str) -> SealedFile:
    """Open a sealed file; raise DamagedError if it belongs to another run."""
    file = SealedFile(path)
    if file.metadata.get(RUN) != run:
        raise DamagedError(f"{path}: belongs to another run")
    return file


def discard(path: Path, problem: str) -> None:
    """Log why a file is not used, and delete it if possible."""
    logger.warning("%s; its results are recomputed", problem)
    remove(path)


class Pieces:
    """Read pieces as one table, sorted by row.

    Parameters
    ----------
    files
        The pieces; see `verified_pieces`.
    layout
        Fields of the results.

    Attributes
    ----------
    rows
        Unique row numbers, ascending.
    n_genes
        Number of per-gene records of each row (rows,).
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
        """Size of all results in bytes."""
        n_genes = int(self.n_genes.sum())
        fields = self.layout.values()
        return sum(field.record_bytes * (n_genes if field.per_gene else len(self.rows)) for field in fields)

    def is_done(self, n_rows: int) -> np.ndarray:
        """Mask (n_rows,) of the rows that have results."""
        done = np.zeros(n_rows, bool)
        done[self.rows] = True
        return done

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read a per-cell field of the rows in [start, stop), in order."""
        return self._gather(name, self.piece[start:stop], self.place[start:stop])

    def read_genes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read a per-gene field of the rows in [start, stop), concatenated cell by cell."""
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
    """Read the records at `places` into `values`, merging nearby records into contiguous reads."""
    order = np.argsort(places)
    cuts = 1 + np.flatnonzero(np.diff(places[order]) > _GAP)
    for start, stop in pairwise([0, *cuts, len(places)]):
        chosen = order[start:stop]
        first, last = int(places[chosen[0]]), int(places[chosen[-1]])
        span = file.read_rows(name, first, last + 1)
        values[into[chosen]] = span[places[chosen] - first]
