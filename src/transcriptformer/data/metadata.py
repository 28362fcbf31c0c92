"""The cells' metadata (`obs`), read in blocks of rows, so that its size does not matter; how several tables join."""

from collections.abc import Sequence
from typing import Any, Protocol

import anndata
import numpy as np
import pandas as pd

from transcriptformer.data.store import Store
from transcriptformer.errors import DataError

BLOCK_SIZE = 65_536
"""Rows that are held at a time."""


class Metadata(Protocol):
    """A table with one row per cell.

    Attributes
    ----------
    columns
        Its columns, in order.
    """

    columns: list[str]

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The rows from `start` to before `stop`, with these columns; None: all."""
        ...


class MetadataInMemory:
    """A data frame as `Metadata`."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame, self.columns = frame, list(frame.columns)

    def __len__(self) -> int:
        return len(self.frame)

    def rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> pd.DataFrame:  # noqa: D102
        block = self.frame.iloc[start:stop]
        return block if columns is None else block[list(columns)]


class StoredMetadata:
    """A data frame in an h5ad file or a zarr store as `Metadata`."""

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key
        attributes = store[key].attrs
        self.columns = [str(column) for column in attributes["column-order"]]
        self.index_key = str(attributes["_index"])
        self.n_rows = _n_rows(store[key][self.index_key])
        for column in self.columns:
            n_rows = _n_rows(store[key][column])
            if n_rows != self.n_rows:
                raise DataError(f"{store.name}: damaged: {key} has {self.n_rows} rows, its column {column!r} {n_rows}")

    def __len__(self) -> int:
        return self.n_rows

    def rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> pd.DataFrame:  # noqa: D102
        group = self.store[self.key]
        chosen = self.columns if columns is None else list(columns)
        index = pd.Index(_rows(group[self.index_key], start, stop))
        values = {column: _rows(group[column], start, stop) for column in chosen}
        frame = pd.DataFrame(values, index=index, columns=chosen)
        frame.index.name = None if self.index_key == "_index" else self.index_key
        return frame


def open_metadata(store: Store, key: str) -> Metadata:
    """The table under `key`; one in a layout of early releases of anndata is read whole."""
    attributes = store[key].attrs
    if "column-order" not in attributes or "__categories" in store[key]:
        return MetadataInMemory(anndata.io.read_elem(store[key]))
    return StoredMetadata(store, key)


def _n_rows(element: Any) -> int:
    encoding = str(element.attrs.get("encoding-type", ""))
    per_row = "codes" if encoding == "categorical" else "values" if encoding.startswith("nullable-") else None
    return (element[per_row] if per_row else element).shape[0]


def _rows(element: Any, start: int, stop: int) -> Any:
    """Rows of one column, in the layout that its encoding prescribes."""
    encoding = str(element.attrs.get("encoding-type", ""))
    if encoding == "categorical":
        codes, categories = element["codes"][start:stop], anndata.io.read_elem(element["categories"])
        return pd.Categorical.from_codes(codes, categories, ordered=bool(element.attrs["ordered"]))
    if encoding.startswith("nullable-"):
        values, missing = _values(element["values"], start, stop), element["mask"][start:stop]
        if encoding == "nullable-string-array":
            return pd.Series(values, dtype=object).mask(missing).astype("string").array
        kind = pd.arrays.BooleanArray if encoding == "nullable-boolean" else pd.arrays.IntegerArray
        return kind(values, missing)
    return _values(element, start, stop)


def _values(array: Any, start: int, stop: int) -> np.ndarray:
    if array.dtype.kind in "OSUT":
        strings = array.asstr() if hasattr(array, "asstr") else array
        return np.asarray(strings[start:stop]).astype(object)
    return np.asarray(array[start:stop])


def encode(parts: Sequence[Metadata], column: str) -> tuple[np.ndarray, list[str]]:
    """The values of one column of several tables, one after the other, as numbers, and what the numbers stand for.

    Returns
    -------
    Codes (cells,), int64, -1 where there is no value; and the distinct values, as text, sorted.
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


class JoinedMetadata:
    """Tables one below the other, with the columns of all of them and one type for each column.

    The type is anndata's for an outer join: categories are united, numbers widened. Text that only some tables have
    becomes categorical, for h5ad has no other place for missing text; truth values that only some have become nullable.

    Parameters
    ----------
    parts
        The tables.
    columns
        Those to keep, in this order; None: all.

    Raises
    ------
    DataError
        If a column holds text in one table and numbers in another.
    """

    def __init__(self, parts: Sequence[Metadata], columns: Sequence[str] | None = None) -> None:
        self.parts = parts
        all_columns = list(dict.fromkeys(column for part in parts for column in part.columns))
        self.columns = all_columns if columns is None else [column for column in all_columns if column in columns]
        self.dtypes = self._join_dtypes() if len(parts) > 1 else None

    def rows(self, part: int, start: int, stop: int) -> pd.DataFrame:
        """Rows of one of the parts, as they stand in the joined table."""
        if self.dtypes is None:
            return self.parts[part].rows(start, stop, self.columns)
        present = [column for column in self.columns if column in self.parts[part].columns]
        block = self.parts[part].rows(start, stop, present).reindex(columns=self.columns)
        return block.astype(self.dtypes).rename_axis(index=self.index_name)

    def _join_dtypes(self) -> dict[str, Any]:
        first_rows = []
        for part in self.parts:
            present = [column for column in self.columns if column in part.columns]
            first_rows.append(anndata.AnnData(obs=part.rows(0, 1, present)))
        with anndata.settings.override(check_uniqueness=False):
            joined = anndata.concat(first_rows, join="outer").obs
        self.index_name = joined.index.name
        return {column: self._joined_dtype(column, joined[column]) for column in self.columns}

    def _joined_dtype(self, column: str, values: pd.Series) -> Any:
        if values.dtype != object:
            return values.dtype
        kind = pd.api.types.infer_dtype(values, skipna=True)
        if kind == "boolean":
            return "boolean"
        if kind not in ("string", "empty"):
            raise DataError(
                f"obs: column {column!r} holds text in one input and something else in another; leave it out by "
                "model.inference_config.obs_keys"
            )
        # Plain text has no gaps in a file; what is categorical in one of them may have some.
        is_plain = [column in part.columns and part.rows(0, 1, [column])[column].dtype == object for part in self.parts]
        return object if all(is_plain) else pd.CategoricalDtype(self._distinct(column))

    def _distinct(self, column: str) -> list[str]:
        found: set[str] = set()
        for part in self.parts:
            if column in part.columns:
                for start in range(0, len(part), BLOCK_SIZE):
                    found.update(part.rows(start, min(start + BLOCK_SIZE, len(part)), [column])[column].dropna())
        return sorted(found)
