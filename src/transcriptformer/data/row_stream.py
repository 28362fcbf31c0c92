"""Elements of an AnnData that are written some rows at a time, and whether a table can be written so."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from pandas.api.types import infer_dtype

from transcriptformer.data.metadata import ColumnError
from transcriptformer.errors import one_line
from transcriptformer.storage.hdf5 import NewHdf5

CHUNK_BYTES = 2**20
"""Chunks of large arrays in the file have about this size."""


_numbers = count()


class RowStream:
    """An element of an AnnData that is written some rows at a time: an array, or a data frame of any columns.

    anndata itself encodes every block. The arrays that it makes of the first one are then given their full length, and
    those of later blocks go into them.
    """

    def __init__(self, root: h5py.File | zarr.Group, key: str, n_rows: int) -> None:
        self.root, self.key, self.n_rows, self.n_written = root, key, n_rows, 0
        self.arrays: dict[str, Any] = {}
        self.categories: dict[str, pd.Index] = {}
        if key in root:
            del root[key]

    def write(self, block: pd.DataFrame | np.ndarray) -> None:
        """Append rows."""
        if isinstance(self.root, NewHdf5):
            self.root.check()
        here = slice(self.n_written, self.n_written + len(block))
        if self.n_written == 0:
            self._write_first(block)
        elif isinstance(block, np.ndarray):
            self.arrays[""][here] = block
        else:
            with self.encoded(block) as arrays:
                for name, array in arrays.items():
                    self.arrays[name][here] = array[:]
        self.n_written += len(block)

    @contextmanager
    def encoded(self, block: pd.DataFrame) -> Iterator[Mapping[str, Any]]:
        """The arrays of a block after the first, by path, in memory.

        Raises
        ------
        TypeError, ValueError, …
            If anndata cannot write it, or not in the arrays of the first block.
        """
        # Of categorical columns only the codes: the categories are in the file, and may be as many as cells.
        codes = {column: block[column].cat for column in self.categories}
        for column, categorical in codes.items():
            if not categorical.categories.equals(self.categories[column]):
                raise ValueError(f"column {column!r} has other categories than in the first rows")
        block = block.assign(**{column: categorical.codes for column, categorical in codes.items()})
        with _scratch(isinstance(self.root, zarr.Group)) as scratch:
            anndata.io.write_elem(scratch, "block", block)
            places = {f"{column}/codes": column for column in codes}
            arrays = {name: scratch["block"][places.get(name, name)] for name in self.arrays}
            for name, array in arrays.items():
                if array.dtype != self.arrays[name].dtype:
                    raise ValueError(f"{name} is of {array.dtype}, but of {self.arrays[name].dtype} in the first rows")
            yield arrays

    def _write_first(self, block: pd.DataFrame | np.ndarray) -> None:
        if len(block) == self.n_rows:
            anndata.io.write_elem(self.root, self.key, block)
            return
        options: dict[str, Any] = {}
        if isinstance(self.root, h5py.File):  # where an array can only grow if that was said when it was made
            options["maxshape"] = (None, *block.shape[1:]) if isinstance(block, np.ndarray) else (None,)
        if isinstance(block, np.ndarray) and block.ndim == 2:
            options["chunks"] = (max(1, CHUNK_BYTES // block[:1].nbytes), block.shape[1])
        anndata.io.write_elem(self.root, self.key, block, dataset_kwargs=options)
        for name, array in _arrays_per_row(self.root[self.key]):
            array.resize((self.n_rows, *array.shape[1:]))
            self.arrays[name] = array
        if isinstance(block, pd.DataFrame):
            self.categories = {
                str(column): values.cat.categories
                for column, values in block.items()
                if isinstance(values.dtype, pd.CategoricalDtype)
            }


def check_writable_rows(blocks: Iterable[tuple[str, int, pd.DataFrame]], n_rows: int, as_zarr: bool) -> None:
    """Encode a table as `RowStream` will, in memory, a block at a time.

    Parameters
    ----------
    blocks
        The table in blocks, each with the name of its source and the row there that it begins at.
    n_rows
        Rows of all blocks.
    as_zarr
        Encode it for a zarr store instead of an h5ad file.

    Raises
    ------
    ColumnError
        If it cannot be written so; it names the source, the column and the cell.
    """
    with strings_as_they_are(), _scratch(as_zarr) as root:
        stream = RowStream(root, "obs", n_rows)
        for source, start, block in blocks:
            try:
                _require_text(block)
                if stream.arrays:
                    with stream.encoded(block):
                        pass
                else:
                    stream.write(block)
            except Exception as error:  # anndata, h5py and zarr raise whatever values of odd types lead them to
                raise _fault(source, start, block, as_zarr, error) from error


def _fault(source: str, start: int, block: pd.DataFrame, as_zarr: bool, error: Exception) -> ColumnError:
    """What to say of a block that cannot be written: its first column, and cell, that cannot be written by itself."""
    for i, column in enumerate(block.columns):
        alone = block.iloc[:, [i]]
        reason = _refusal(alone, as_zarr)
        if reason is None:
            continue
        told = f"{source}: obs: column {column!r} cannot be written ({reason})"
        if _refusal(alone.iloc[:0], as_zarr) is None:
            row = _first_refused(alone, as_zarr)
            value = one_line(ValueError(repr(alone.iloc[row, 0])))[:50]
            told += f", the first time in cell {str(block.index[row])!r} (row {start + row}), where it is {value}"
        return ColumnError(told, column)
    return ColumnError(f"{source}: obs: cannot be written ({_reason(error)})", None)


def _first_refused(column: pd.DataFrame, as_zarr: bool) -> int:
    """Row of the first value that keeps a column from being written."""
    fewest, most = 0, len(column)  # rows that can be written, and that cannot
    while most - fewest > 1:
        middle = (fewest + most) // 2
        if _refusal(column.iloc[:middle], as_zarr) is None:
            fewest = middle
        else:
            most = middle
    return most - 1


def _refusal(block: pd.DataFrame, as_zarr: bool) -> str | None:
    """Why anndata does not write a block; None: it does."""
    with _scratch(as_zarr) as scratch:
        try:
            _require_text(block)
            anndata.io.write_elem(scratch, "block", block)
        except Exception as error:
            return _reason(error)
    return None


def _require_text(block: pd.DataFrame) -> None:
    """Raise TypeError where objects are no text: some would be written as something else."""
    for column in block.columns:
        of_column = block[column]
        is_categorical = isinstance(of_column.dtype, pd.CategoricalDtype)
        values = of_column.cat.categories if is_categorical else of_column
        if values.dtype == object and (kind := infer_dtype(values, skipna=False)) not in ("string", "empty"):
            raise TypeError(f"holds {kind} values")


def _reason(error: Exception) -> str:
    """The first line of an error, without where anndata was when it was raised."""
    return one_line(ValueError(str(error).partition("\n")[0] or type(error).__name__))


@contextmanager
def strings_as_they_are() -> Iterator[None]:
    """Text stays text: the metadata is to be found again exactly as it was."""
    with anndata.settings.override(allow_write_nullable_strings=True, check_uniqueness=False):
        yield


def _arrays_per_row(element: Any) -> Iterator[tuple[str, Any]]:
    """Arrays below an element, by path, that have an entry per row."""
    if not hasattr(element, "keys"):
        yield "", element
        return
    for name in element:
        if name != "categories" or element.attrs.get("encoding-type") != "categorical":
            for path, array in _arrays_per_row(element[name]):
                yield f"{name}/{path}".rstrip("/"), array


@contextmanager
def _scratch(as_zarr: bool) -> Iterator[Any]:
    """A place in memory of the kind that results are written to."""
    if as_zarr:
        store = zarr.storage.MemoryStore()
        yield zarr.open_group(store, mode="w", zarr_format=anndata.settings.zarr_write_format)
        return
    with h5py.File(f"scratch-{next(_numbers)}", "w", driver="core", backing_store=False) as file:
        yield file
