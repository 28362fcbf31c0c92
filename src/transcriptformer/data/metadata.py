"""Cell metadata (`obs`) of any size, read in blocks of rows."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import anndata
import numpy as np
import pandas as pd

from transcriptformer.data.store import Store, attribute
from transcriptformer.errors import DataError, one_line

logger = logging.getLogger(__name__)

BLOCK_SIZE = 65_536
"""Rows in memory at a time."""


class Metadata(Protocol):
    """A table with one row per cell.

    Attributes
    ----------
    columns
        Column names, in order.
    """

    columns: list[str]

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return rows `start:stop` of `columns`; None for all columns."""
        ...


class MetadataInMemory:
    """`Metadata` of a data frame in memory."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame, self.columns = frame, list(dict.fromkeys(frame.columns))

    def __len__(self) -> int:
        return len(self.frame)

    def rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> pd.DataFrame:  # noqa: D102
        block = self.frame.iloc[start:stop]
        if columns is None:
            return block
        chosen = list(columns)
        block = block[chosen]
        if len(block.columns) > len(chosen):
            repeated = next(iter(block.columns[block.columns.duplicated()]))
            raise ColumnError(f"obs: column name {repeated!r} is not unique; rename the duplicates", repeated)
        return block


class ColumnError(DataError):
    """Metadata column that cannot be read or written.

    Attributes
    ----------
    column
        Column name; None for the index.
    """

    def __init__(self, message: str, column: Any = None) -> None:
        super().__init__(message)
        self.column = column

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.column)  # workers send errors to the main process


class StoredMetadata:
    """`Metadata` of columns in an HDF5 file or a zarr store, which are validated when they are read.

    Parameters
    ----------
    store, key
        Group of the columns.
    index_key
        Column with the cell names.
    columns
        The other columns.
    """

    def __init__(self, store: Store, key: str, index_key: str, columns: Sequence[str]) -> None:
        self.store, self.key, self.index_key, self.columns = store, key, index_key, list(columns)
        self.n_rows = n_rows(store[key][index_key])
        self.categories: dict[str, _Categories] = {}
        self.warnings: set[str] = set()

    def __len__(self) -> int:
        return self.n_rows

    def rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return rows `start:stop` of `columns`; None for all columns.

        Raises
        ------
        ColumnError
            If a column is damaged or does not have one value per cell.
        """
        chosen = self.columns if columns is None else list(columns)
        index, is_text = self._index(start, stop)
        values = {column: self._column(column, start, stop) for column in chosen}
        frame = pd.DataFrame(values, index=index, columns=chosen)
        is_named = self.index_key != "_index" and (is_text or self.index_key not in chosen)
        frame.index.name = self.index_key if is_named else None
        return frame

    def _index(self, start: int, stop: int) -> tuple[pd.Index, bool]:
        """Return the cell names as text, and whether they are stored as text."""
        index = pd.Index(self._column(self.index_key, start, stop))
        if index.hasnans:
            row = start + int(index.isna().argmax())
            raise ColumnError(
                f"{self.store.name}: {self.key}: the cell in row {row} has no name; set adata.obs_names and write "
                "the file again",
                None,
            )
        is_text = index.dtype in (object, "string")
        return (index if is_text else index.astype(str).astype(object)), is_text

    def _column(self, column: str, start: int, stop: int) -> Any:
        group = self.store[self.key]
        try:
            element = group[column]
            n_found = n_rows(element)
            if n_found != self.n_rows:
                lengths = f"{self.key} has {self.n_rows} rows, but its column {column!r} has {n_found}"
                raise ColumnError(f"{self.store.name}: damaged: {lengths}", column)
            return self._values(column, element, start, stop)
        except UnicodeDecodeError as error:
            text = error.object[:50] if isinstance(error.object, bytes) else b""
            reason = f"contains text that is not UTF-8, {text!r}"
            if not hasattr(group[column], "keys"):
                reason += f", in {self._cell(_first_undecodable(group[column], start, stop))}"
        except ColumnError:
            raise
        except DataError as error:
            reason = str(error)
        except Exception as error:  # on damaged data, h5py, zarr and pandas may raise anything
            reason = f"cannot be read ({one_line(error)})"
        name = "the index" if column == self.index_key else f"column {column!r}"
        raise ColumnError(f"{self.store.name}: {self.key}: {name} {reason}", column)

    def _values(self, column: str, element: Any, start: int, stop: int) -> Any:
        if _encoding(element) and "encoding-version" not in element.attrs:  # its values may be damaged as well
            raise DataError("is damaged: its encoding has no version")
        if _encoding(element) == "categorical":
            return self._categorical(column, element["codes"], element["categories"], element, start, stop)
        if "categories" in element.attrs:  # anndata < 0.8 refers to `__categories`
            categories = self.store[self.key][element.attrs["categories"]]
            return self._categorical(column, element, categories, categories, start, stop)
        values = _rows(element, start, stop)
        if isinstance(values, np.ndarray) and values.ndim == 2 and values.shape[1] == 1:
            self._warn_once(f"column {column!r} is an array of shape {element.shape}; reading it as one column")
            values = values[:, 0]
        if values.ndim != 1:
            raise DataError(f"is an array of shape {element.shape}; expected one value per cell")
        if values.dtype.kind == "V":
            raise DataError(f"contains records of {', '.join(values.dtype.names or ['bytes'])}; expected single values")
        return values

    def _categorical(
        self, column: str, stored_codes: Any, categories: Any, with_order: Any, start: int, stop: int
    ) -> pd.Categorical:
        if column not in self.categories:
            self.categories[column] = _Categories(categories)
            for problem in self.categories[column].problems:
                self._warn_once(f"column {column!r} {problem}")
        found = self.categories[column]
        codes = np.asarray(stored_codes[start:stop])
        is_bad = (codes < -1) | (codes >= len(found.codes))
        if is_bad.any():
            row = int(is_bad.argmax())
            raise DataError(
                f"has {len(found.codes)} categories, but {self._cell(start + row)} has category code {codes[row]}"
            )
        if found.problems:
            codes = np.append(found.codes, -1)[codes]
        is_ordered = bool(with_order.attrs.get("ordered", False)) and not found.problems
        return pd.Categorical.from_codes(codes, found.values, ordered=is_ordered)

    def _cell(self, row: int) -> str:
        try:
            name = _rows(self.store[self.key][self.index_key], row, row + 1)[0]
        except Exception:  # on a damaged index, h5py and zarr may raise anything
            return f"row {row}"
        return f"cell {name!r} (row {row})"

    def _warn_once(self, warning: str) -> None:
        if warning not in self.warnings:
            self.warnings.add(warning)
            logger.warning("%s: %s: %s", self.store.name, self.key, warning)


class _Categories:
    """Unique categories of a column.

    Attributes
    ----------
    values
        Unique categories.
    codes
        New code of each stored category, -1 for a missing one.
    problems
        Descriptions of the problems that were repaired.
    """

    def __init__(self, stored: Any) -> None:
        found = pd.Index(_rows(stored, 0, n_rows(stored)))
        self.values, self.codes, self.problems = found, np.arange(len(found)), list[str]()
        if found.has_duplicates:
            some = ", ".join(repr(value) for value in found[found.duplicated()].unique()[:3])
            self.problems.append(f"has duplicate categories ({some}); merging them, without their order")
        if found.hasnans:
            self.problems.append("has a missing category; treating its cells as missing values")
        if self.problems:
            self.codes, self.values = pd.factorize(found)


def open_metadata(store: Store, key: str) -> Metadata:
    """Open the data frame under `key`; tables in the layout of early anndata releases are loaded completely."""
    frame = store[key]
    if "column-order" not in frame.attrs:
        return MetadataInMemory(anndata.io.read_elem(frame))
    index_key = str(attribute(frame, "_index"))
    columns = dict.fromkeys(str(column) for column in attribute(frame, "column-order", ()))
    return StoredMetadata(store, key, index_key, [c for c in columns if c != "_index" or index_key != "_index"])


def n_rows(element: Any) -> int:
    """Return the length of a column or an index of any encoding.

    Raises
    ------
    DataError
        If the element is not a column.
    """
    encoding = _encoding(element)
    per_row = "codes" if encoding == "categorical" else "values" if encoding.startswith("nullable-") else None
    array = element[per_row] if per_row else element
    if hasattr(array, "keys"):
        raise DataError(f"is stored as {encoding or 'a group'}; expected one value per cell")
    return array.shape[0] if array.shape else 0


def _encoding(element: Any) -> str:
    return str(attribute(element, "encoding-type"))


def _rows(element: Any, start: int, stop: int) -> Any:
    """Read rows of a column that is not categorical, according to its encoding."""
    encoding = _encoding(element)
    if encoding.startswith("nullable-"):
        values = _array(element["values"], start, stop)
        missing = np.asarray(element["mask"][start:stop]).astype(bool)
        if encoding == "nullable-string-array":
            return pd.Series(values, dtype=object).mask(missing).astype("string").array
        kind = pd.arrays.BooleanArray if encoding == "nullable-boolean" else pd.arrays.IntegerArray
        return kind(values, missing)
    return _array(element, start, stop)


def _array(array: Any, start: int, stop: int) -> np.ndarray:
    if array.dtype.kind in "OSUT":
        # HDF5 files may declare UTF-8 text as ASCII.
        strings = array.asstr("utf-8") if hasattr(array, "asstr") else array
        values = np.asarray(strings[start:stop]).astype(object)
        if values.ndim == 1 and len(values) and isinstance(values[0], bytes):
            values = np.array([value.decode() for value in values], object)
        return values
    values = np.asarray(array[start:stop])
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def _first_undecodable(array: Any, start: int, stop: int) -> int:
    """Return the first row whose text is not UTF-8, or `start`."""
    for row in range(start, stop):
        try:
            _array(array, row, row + 1)
        except UnicodeDecodeError:
            return row
    return start


def factorize(parts: Sequence[Metadata], column: str) -> tuple[np.ndarray, list[str]]:
    """Factorize a column of several concatenated tables.

    Returns
    -------
    Codes (cells,), int64, -1 for missing values; and the sorted unique values, as text.
    """
    numbers: dict[str, int] = {}
    found: list[np.ndarray] = []
    for part in parts:
        for start in range(0, len(part), BLOCK_SIZE):
            stop = min(start + BLOCK_SIZE, len(part))
            if column in part.columns:
                codes, distinct = pd.factorize(part.rows(start, stop, [column])[column])
            else:
                codes, distinct = np.full(stop - start, -1), pd.Index([])
            number = [numbers.setdefault(str(value), len(numbers)) for value in distinct]
            found.append(np.array([*number, -1], np.int64)[codes])
    order = {value: rank for rank, value in enumerate(sorted(numbers))}
    ranks = np.array([*map(order.get, numbers), -1], np.int64)
    return ranks[np.concatenate(found)], list(order)
