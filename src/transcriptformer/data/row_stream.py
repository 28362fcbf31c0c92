"""Writing AnnData elements in blocks of rows, and checking that a table can be written."""

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
"""Approximate chunk size of large arrays."""

_scratch_numbers = count()


class RowStream:
    """Writer for an AnnData element, an array or a data frame, in blocks of rows.

    anndata encodes every block. The arrays of the first block are resized to their full length, and later blocks are
    written into them.
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
        """Encode a block after the first in memory; yields its arrays by path.

        Raises
        ------
        TypeError, ValueError, …
            If anndata cannot write the block, or it does not match the arrays of the first block.
        """
        # Encode only the codes of categorical columns: categories are in the file, and may be as many as cells.
        codes = {column: block[column].cat for column in self.categories}
        for column, categorical in codes.items():
            if not categorical.categories.equals(self.categories[column]):
                raise ValueError(f"column {column!r} has different categories than in the first rows")
        block = block.assign(**{column: categorical.codes for column, categorical in codes.items()})
        with _scratch(isinstance(self.root, zarr.Group)) as scratch:
            anndata.io.write_elem(scratch, "block", block)
            places = {f"{column}/codes": column for column in codes}
            arrays = {name: scratch["block"][places.get(name, name)] for name in self.arrays}
            for name, array in arrays.items():
                if array.dtype != self.arrays[name].dtype:
                    raise ValueError(f"{name} is {array.dtype}, but {self.arrays[name].dtype} in the first rows")
            yield arrays

    def _write_first(self, block: pd.DataFrame | np.ndarray) -> None:
        if len(block) == self.n_rows:
            anndata.io.write_elem(self.root, self.key, block)
            return
        options: dict[str, Any] = {}
        if isinstance(self.root, h5py.File):  # HDF5 datasets are resizable only if created with maxshape
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
    """Check that `RowStream` can write a table, by encoding it in memory block by block.

    Parameters
    ----------
    blocks
        Blocks of the table, each with the name of its source and its first row there.
    n_rows
        Total number of rows.
    as_zarr
        Encode for a zarr store instead of an h5ad file.

    Raises
    ------
    ColumnError
        If the table cannot be written; the message has the source, the column and the cell.
    """
    with preserved_strings(), _scratch(as_zarr) as root:
        stream = RowStream(root, "obs", n_rows)
        for source, start, block in blocks:
            try:
                _require_text(block)
                if stream.arrays:
                    with stream.encoded(block):
                        pass
                else:
                    stream.write(block)
            except Exception as error:  # on unusual values, anndata, h5py and zarr may raise anything
                raise _column_error(source, start, block, as_zarr, error) from error


def _column_error(source: str, start: int, block: pd.DataFrame, as_zarr: bool, error: Exception) -> ColumnError:
    """Return an error for the first column and cell of a block that cannot be written."""
    for i, column in enumerate(block.columns):
        single = block.iloc[:, [i]]
        reason = _write_error(single, as_zarr)
        if reason is None:
            continue
        message = f"{source}: obs: column {column!r} cannot be written ({reason})"
        if _write_error(single.iloc[:0], as_zarr) is None:
            row = _first_unwritable(single, as_zarr)
            value = one_line(ValueError(repr(single.iloc[row, 0])))[:50]
            message += f", first in cell {str(block.index[row])!r} (row {start + row}) with value {value}"
        return ColumnError(message, column)
    return ColumnError(f"{source}: obs: cannot be written ({_reason(error)})", None)


def _first_unwritable(column: pd.DataFrame, as_zarr: bool) -> int:
    """Return the row of the first value that cannot be written, by bisection."""
    low, high = 0, len(column)  # the first `low` rows can be written, the first `high` cannot
    while high - low > 1:
        middle = (low + high) // 2
        if _write_error(column.iloc[:middle], as_zarr) is None:
            low = middle
        else:
            high = middle
    return high - 1


def _write_error(block: pd.DataFrame, as_zarr: bool) -> str | None:
    """Return why anndata cannot write a block; None if it can."""
    with _scratch(as_zarr) as scratch:
        try:
            _require_text(block)
            anndata.io.write_elem(scratch, "block", block)
        except Exception as error:
            return _reason(error)
    return None


def _require_text(block: pd.DataFrame) -> None:
    """Raise TypeError for object columns other than text, some of which would be written as something else."""
    for column in block.columns:
        series = block[column]
        is_categorical = isinstance(series.dtype, pd.CategoricalDtype)
        values = series.cat.categories if is_categorical else series
        if values.dtype == object and (kind := infer_dtype(values, skipna=False)) not in ("string", "empty"):
            raise TypeError(f"contains {kind} values")


def _reason(error: Exception) -> str:
    """Return the first line of an error, without the location that anndata appends."""
    return one_line(ValueError(str(error).partition("\n")[0] or type(error).__name__))


@contextmanager
def preserved_strings() -> Iterator[None]:
    """Make anndata write text as text, so that metadata is preserved exactly."""
    with anndata.settings.override(allow_write_nullable_strings=True, check_uniqueness=False):
        yield


def _arrays_per_row(element: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arrays below an element that have an entry per row, with their paths."""
    if not hasattr(element, "keys"):
        yield "", element
        return
    for name in element:
        if name != "categories" or element.attrs.get("encoding-type") != "categorical":
            for path, array in _arrays_per_row(element[name]):
                yield f"{name}/{path}".rstrip("/"), array


@contextmanager
def _scratch(as_zarr: bool) -> Iterator[Any]:
    """Open an in-memory zarr group or HDF5 file."""
    if as_zarr:
        store = zarr.storage.MemoryStore()
        yield zarr.open_group(store, mode="w", zarr_format=anndata.settings.zarr_write_format)
        return
    with h5py.File(f"scratch-{next(_scratch_numbers)}", "w", driver="core", backing_store=False) as file:
        yield file
