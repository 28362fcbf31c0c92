"""Concatenation of metadata tables."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
from pandas.api.types import (
    infer_dtype,
    is_bool_dtype,
    is_complex_dtype,
    is_float_dtype,
    is_integer_dtype,
    is_numeric_dtype,
    is_object_dtype,
    is_string_dtype,
)

from transcriptformer.data.metadata import BLOCK_SIZE, Metadata, MetadataInMemory
from transcriptformer.errors import DataError, one_line

logger = logging.getLogger(__name__)

TEXT, BOOLEAN, NUMBER = "text", "booleans", "numbers"

MAX_EXACT_INT = 2**53
"""Largest magnitude up to which float64 represents every integer exactly."""

_KINDS = {
    "string": TEXT,
    "boolean": BOOLEAN,
    **dict.fromkeys(("integer", "floating", "mixed-integer-float"), NUMBER),
}
"""Kinds of values by the result of `pandas.api.types.infer_dtype`."""


class JoinedMetadata:
    """Concatenation of tables, with the union of their columns and one dtype per column.

    Dtypes are those of anndata's outer join: categories are merged, numbers widened. Text columns that some tables lack
    become categorical, because h5ad cannot store missing text otherwise; boolean ones become nullable. Columns of mixed
    kinds become text, with a warning.

    Parameters
    ----------
    parts
        Tables to concatenate.
    columns
        Columns to keep; None for all.

    Raises
    ------
    ColumnError
        If a column cannot be read.
    """

    def __init__(self, parts: Sequence[Metadata], columns: Sequence[str] | None = None) -> None:
        self.parts = parts
        all_columns = list(dict.fromkeys(column for part in parts for column in part.columns))
        self.columns = all_columns if columns is None else [column for column in all_columns if column in columns]
        self.dtypes: dict[str, Any] | None = None
        self.as_text: set[str] = set()
        if len(parts) > 1:
            self._join_dtypes()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def rows(self, part: int, start: int, stop: int) -> pd.DataFrame:
        """Return rows `start:stop` of one part, with the columns and dtypes of the joined table."""
        if self.dtypes is None:
            return self.parts[part].rows(start, stop, self.columns)
        present = [column for column in self.columns if column in self.parts[part].columns]
        block = self.parts[part].rows(start, stop, present)
        texts = {column: _as_text(block[column]) for column in present if column in self.as_text}
        block = block.assign(**texts).reindex(columns=self.columns)
        try:
            return block.astype(self.dtypes).rename_axis(index=self.index_name)
        except Exception as error:  # pandas may raise anything on out-of-range values
            raise DataError(f"obs: cannot join the inputs' tables ({one_line(error)})") from error

    def _join_dtypes(self) -> None:
        first_rows = []
        for part in self.parts:
            present = [column for column in self.columns if column in part.columns]
            first_rows.append(anndata.AnnData(obs=part.rows(0, 1, present)))
        try:
            with warnings.catch_warnings(), anndata.settings.override(check_uniqueness=False):
                warnings.simplefilter("ignore")  # about all-NA first rows
                joined = anndata.concat(first_rows, join="outer").obs
        except Exception as error:  # pandas may raise anything on unusual dtypes
            raise DataError(f"obs: cannot join the inputs' tables ({one_line(error)})") from error
        is_also_column = joined.index.name in self.columns
        self.index_name = None if is_also_column else joined.index.name
        self.dtypes = {column: self._joined_dtype(column, joined[column].dtype) for column in self.columns}

    def _joined_dtype(self, column: str, dtype: Any) -> Any:
        """Return the joined dtype of a column, given anndata's dtype for the inputs' first rows."""
        having = [part for part in self.parts if column in part.columns]
        firsts = [values for part in having if _kind(values := _representative(part, column)) is not None]
        kinds = dict.fromkeys(map(_kind, firsts))
        if len(kinds) > 1:  # unless a column of one kind is empty, such as text that was read as NaN
            having = [part for part in having if not _is_empty(part, column)]
            firsts = [values for part in having if _kind(values := _representative(part, column)) is not None]
            kinds = dict.fromkeys(map(_kind, firsts))
        if len(kinds) > 1:
            return self._text_dtype(column, f"contains {' and '.join(map(str, kinds))} in different inputs")
        if not firsts:
            return pd.CategoricalDtype([]) if is_object_dtype(dtype) else dtype
        dtypes = [values.dtype for values in firsts]
        if any(getattr(kind, "ordered", False) for kind in dtypes) and not getattr(dtype, "ordered", False):
            logger.warning("obs: the inputs order the categories of column %r differently; dropping the order", column)
        categoricals = [kind for kind in dtypes if isinstance(kind, pd.CategoricalDtype)]
        is_categorical = len(categoricals) == len(dtypes)
        (kind,) = kinds
        if is_categorical and isinstance(dtype, pd.CategoricalDtype):
            plain = [kind.categories.dtype for kind in categoricals]
            if kind == NUMBER and len(set(plain)) > 1 and self._largest(column, plain) > MAX_EXACT_INT:
                return self._text_dtype(column, "contains integers that a float would round")
            return dtype
        if kind == TEXT:
            return self._joined_text(column, dtypes)
        if is_categorical:
            return pd.CategoricalDtype(list(dict.fromkeys(value for kind in categoricals for value in kind.categories)))
        if kind == BOOLEAN:
            is_complete = len(firsts) == len(self.parts) and set(dtypes) == {np.dtype(bool)}
            return np.dtype(bool) if is_complete else "boolean"
        if kind == NUMBER:
            return self._joined_number(column, dtypes)
        is_same = len(set(dtypes)) == 1 and not is_object_dtype(dtypes[0])
        return dtypes[0] if is_same else self._text_dtype(column, f"contains {kind}")

    def _joined_text(self, column: str, dtypes: Sequence[Any]) -> Any:
        """Return a dtype for text: plain if no value can be missing, because h5ad has no missing plain text."""
        if all(dtype == "string" for dtype in dtypes):
            return "string"
        is_plain = len(dtypes) == len(self.parts) and all(map(is_object_dtype, dtypes))
        return object if is_plain else pd.CategoricalDtype(self._distinct(column))

    def _joined_number(self, column: str, dtypes: Sequence[Any]) -> Any:
        """Return a dtype for numbers: widened without rounding; numeric categories become plain numbers."""
        plain = [dtype.categories.dtype if isinstance(dtype, pd.CategoricalDtype) else dtype for dtype in dtypes]
        is_whole = all(map(is_integer_dtype, plain))
        # From the dtypes alone, because pandas ignores those of all-NA values.
        dtype = pd.concat([pd.Series([1]).astype(dtype) for dtype in plain]).dtype
        if plain != list(dtypes):
            dtype = "Int64" if is_whole else np.dtype(np.float64)
        elif len(dtypes) < len(self.parts) and isinstance(dtype, np.dtype) and is_integer_dtype(dtype):
            dtype = np.dtype(np.float64)
        if is_float_dtype(dtype):
            dtype = np.dtype(getattr(dtype, "numpy_dtype", dtype))  # anndata cannot write nullable floats
        if is_float_dtype(dtype) and (largest := self._largest(column, plain)) > MAX_EXACT_INT:
            if not is_whole or largest >= 2**63:
                return self._text_dtype(column, "contains integers that a float would round")
            return "Int64"
        return dtype

    def _largest(self, column: str, dtypes: Sequence[Any]) -> int:
        """Return the largest magnitude in a column if it has a 64-bit integer dtype, else 0."""
        if not any(is_integer_dtype(dtype) and dtype.itemsize == 8 for dtype in dtypes):
            return 0
        largest = 0
        for block in self._blocks(column):
            values = block.dropna().unique()
            values = np.asarray(values) if isinstance(values, pd.Categorical) else values
            if len(values) and is_integer_dtype(pd.Index(values).dtype):
                largest = max(largest, abs(int(values.min())), abs(int(values.max())))
        return largest

    def _text_dtype(self, column: str, why: str) -> Any:
        logger.warning("obs: column %r %s; writing it as text", column, why)
        self.as_text.add(column)
        return pd.CategoricalDtype(self._distinct(column))

    def _distinct(self, column: str) -> list[str]:
        found: set[str] = set()
        for block in self._blocks(column):
            found.update((_as_text(block) if column in self.as_text else block).dropna().unique())
        return sorted(found)

    def _blocks(self, column: str) -> Iterator[pd.Series]:
        for part in self.parts:
            if column in part.columns:
                for start in range(0, len(part), BLOCK_SIZE):
                    yield part.rows(start, min(start + BLOCK_SIZE, len(part)), [column])[column]


def _representative(part: Metadata, column: str) -> pd.Series:
    """Return rows of a column that determine its kind of values; a stored column has a single kind."""
    return part.rows(0, len(part) if isinstance(part, MetadataInMemory) else 1, [column])[column]


def _is_empty(part: Metadata, column: str) -> bool:
    """Whether all values of a column are missing."""
    starts = range(0, len(part), BLOCK_SIZE)
    blocks = (part.rows(start, min(start + BLOCK_SIZE, len(part)), [column])[column] for start in starts)
    return all(block.isna().all() for block in blocks)


def _kind(values: pd.Series) -> str | None:
    """Return the kind of values in a column; None if all are missing."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.cat.categories.to_series()
    dtype = values.dtype
    if is_object_dtype(dtype):
        found = infer_dtype(values, skipna=True)
        return None if found == "empty" else _KINDS.get(found, found)
    if is_string_dtype(dtype):
        return TEXT
    if is_bool_dtype(dtype):
        return BOOLEAN
    return NUMBER if is_numeric_dtype(dtype) and not is_complex_dtype(dtype) else str(dtype)


def _as_text(values: pd.Series) -> pd.Series:
    """Convert values to text, missing ones to None."""
    try:
        codes, distinct = pd.factorize(values)
    except TypeError:  # unhashable values such as lists
        return values.map(str, na_action="ignore")
    exact = np.asarray(distinct) if is_float_dtype(distinct.dtype) else distinct  # keeps float32 from becoming float
    texts = np.array([*map(str, exact), None], object)
    return pd.Series(texts[codes], index=values.index, dtype=object)
