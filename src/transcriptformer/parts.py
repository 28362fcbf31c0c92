"""Results on their way: what is computed is appended to plain files, so that a killed run loses a few seconds of work.

A part is written by one process and has one file per field, each a plain sequence of little-endian records. The file of
`rows` is written last: what it lists is complete, and anything beyond is ignored when the part is read.
"""

import os
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transcriptformer.config import InferenceConfig
from transcriptformer.errors import OutputError

ROWS, N_GENES, LABEL, LABEL_PROBABILITY = "rows", "n_genes", "label", "label_probability"

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
    def record(self) -> np.dtype:
        """Type of a record."""
        little_endian = np.dtype(self.dtype).newbyteorder("<")
        return np.dtype((little_endian, self.shape))


Layout = Mapping[str, Field]
"""The results there are, by the names of `transcriptformer.lightning.Prediction`."""


def layout_of(inference: InferenceConfig, width: int, with_labels: bool = False) -> Layout:
    """What the results that are wanted look like, for embeddings of that width, and whether labels are told."""
    layout: dict[str, Field] = {}
    if "embeddings" in inference.output_keys and inference.emb_type == "cell":
        layout["embeddings"] = Field("float32", width)
    elif "embeddings" in inference.output_keys:
        layout[N_GENES] = Field("int32")
        layout["genes"] = Field("int32", per_gene=True)
        layout["cge_embeddings"] = Field("float32", width, per_gene=True)
    if "llh" in inference.output_keys:
        layout["llh"] = Field("float32")
    if with_labels:
        layout |= {LABEL: Field("int32"), LABEL_PROBABILITY: Field("float32")}
    return layout


class PartWriter:
    """Appends results to a new part.

    Parameters
    ----------
    folder
        Of the parts; it exists.
    number
        Of the process that writes.
    layout
        What comes; `rows` is added.
    """

    def __init__(self, folder: Path, number: int, layout: Layout) -> None:
        self.stem = new_part(folder, number, ROWS).with_suffix("")
        self.layout = {**layout, ROWS: Field("int64")}  # rows last: they say what is complete
        self.waiting: dict[str, list[np.ndarray]] = {name: [] for name in self.layout}
        self.n_bytes, self.last_flush = 0, time.monotonic()
        try:
            self._path(ROWS).touch(exist_ok=False)
        except OSError as error:
            raise cannot_write(folder, error) from error

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Take the results of a batch, by name of the field."""
        for name, field in self.layout.items():
            array = np.ascontiguousarray(values[name], dtype=np.dtype(field.dtype).newbyteorder("<"))
            self.waiting[name].append(array)
            self.n_bytes += array.nbytes
        if self.n_bytes > BYTES_AT_RISK or time.monotonic() - self.last_flush > SECONDS_AT_RISK:
            self.flush()

    def flush(self) -> None:
        """Write what waits, and see it safely on disk.

        Raises
        ------
        OutputError
            If there is no room; what was written before stays.
        """
        if self.waiting[ROWS]:
            try:
                for name, arrays in self.waiting.items():
                    with self._path(name).open("ab") as file:
                        for array in arrays:
                            file.write(array.data)
                        file.flush()
                        os.fsync(file.fileno())
            except OSError as error:
                raise cannot_write(self.stem.parent, error) from error
            finally:
                self.waiting = {name: [] for name in self.layout}
        self.n_bytes, self.last_flush = 0, time.monotonic()

    def _path(self, name: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}.{name}")


def new_part(folder: Path, number: int, ending: str) -> Path:
    """A path for what process `number` is going to keep, beside what it has kept in earlier attempts."""
    earlier = [int(path.name.partition("-")[0]) for path in folder.glob(f"*-{number:05}.{ending}")]
    return folder / f"{1 + max(earlier, default=0):04}-{number:05}.{ending}"


def cannot_write(folder: Path, error: OSError) -> OutputError:
    """What to say where there is no room for results."""
    return OutputError(
        f"{folder}: results cannot be written ({error.strerror or error}); what is there is kept: "
        "make room, then run the same command with --resume"
    )


class Parts:
    """Reads the parts in a folder as one table, in the order of rows.

    Attributes
    ----------
    layout
        The results there are.
    rows
        Rows that are there, ascending, each once.
    n_genes
        Genes of each of them with a record of their own (rows,).
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout = layout
        self.stems = sorted(path.with_suffix("") for path in folder.glob(f"*.{ROWS}"))
        rows = [_read_whole(stem, ROWS, Field("int64")) for stem in self.stems]
        lengths = [len(part) for part in rows]
        part = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
        place = np.concatenate([np.arange(n) for n in lengths]) if rows else np.zeros(0, np.int64)
        self.rows, first = np.unique(np.concatenate(rows) if rows else place, return_index=True)
        self.part, self.place = part[first], place[first]
        self.n_genes = np.zeros(len(self.rows), np.int32)
        if N_GENES in layout:
            counts = [
                _read_whole(stem, N_GENES, layout[N_GENES])[:n] for stem, n in zip(self.stems, lengths, strict=True)
            ]
            starts = [np.concatenate([[0], np.cumsum(count[:-1], dtype=np.int64)])[: len(count)] for count in counts]
            if counts:
                self.n_genes, self.first_gene = np.concatenate(counts)[first], np.concatenate(starts)[first]

    @property
    def n_bytes(self) -> int:
        """Size of all results."""
        n_genes = int(self.n_genes.sum())
        fields = self.layout.values()
        return sum(field.record.itemsize * (n_genes if field.per_gene else len(self.rows)) for field in fields)

    def is_done(self, n_rows: int) -> np.ndarray:
        """Mask (n_rows,) of the rows that are there."""
        done = np.zeros(n_rows, bool)
        done[self.rows] = True
        return done

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Records of the rows from `start` to before `stop`, in order, for a field that each cell has once."""
        field = self.layout[name]
        values = np.empty((stop - start, *field.shape), field.dtype)
        part, place = self.part[start:stop], self.place[start:stop]
        for i in np.unique(part):
            here = part == i
            values[here] = _gather(self._path(i, name), field, place[here])
        return values

    def read_genes(self, name: str, start: int, stop: int) -> np.ndarray:
        """The same for a field that each gene of a cell has: cell after cell."""
        field, part, lengths = self.layout[name], self.part[start:stop], self.n_genes[start:stop]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = np.repeat(self.first_gene[start:stop], lengths) + within
        values = np.empty((len(places), *field.shape), field.dtype)
        part_of_gene = np.repeat(part, lengths)
        for i in np.unique(part):
            here = part_of_gene == i
            values[here] = _gather(self._path(i, name), field, places[here])
        return values

    def _path(self, part: int, name: str) -> Path:
        return self.stems[part].with_name(f"{self.stems[part].name}.{name}")


def _read_whole(stem: Path, name: str, field: Field) -> np.ndarray:
    """All complete records of one file."""
    path = stem.with_name(f"{stem.name}.{name}")
    if not path.exists():
        return np.zeros((0, *field.shape), field.dtype)
    n_records = path.stat().st_size // field.record.itemsize
    return np.fromfile(path, field.record, n_records).astype(field.dtype, copy=False)


def _gather(path: Path, field: Field, places: np.ndarray) -> np.ndarray:
    """Records at `places`, which lie close together for the most part: few contiguous reads, no memory map."""
    values = np.empty((len(places), *field.shape), field.dtype)
    if len(places) == 0:
        return values
    order = np.argsort(places)
    cuts = 1 + np.flatnonzero(np.diff(places[order]) > _GAP)
    for start, stop in pairwise([0, *cuts, len(places)]):
        chosen = order[start:stop]
        first, last = int(places[chosen[0]]), int(places[chosen[-1]])
        span = np.fromfile(path, field.record, last - first + 1, offset=first * field.record.itemsize)
        values[chosen] = span[places[chosen] - first]
    return values
