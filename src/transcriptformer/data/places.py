"""Where an input holds raw counts: the places with a matrix, what kind of values each holds, and the choice."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from transcriptformer.data.counts import ByColumn, Matrix, to_canonical_csr
from transcriptformer.data.metadata import Metadata
from transcriptformer.data.store import Store, unreadable
from transcriptformer.errors import DataError, UsageError

logger = logging.getLogger(__name__)

RAW, X = ".raw.X", ".X"

COUNT_LAYERS = ("counts", "raw_counts", "raw", "count", "umi_counts", "UMI", "umis", "spliced")
"""Usual names of layers with counts, in order of preference."""

AUTO = "auto"
"""Value of `use_raw`: the first matrix with whole numbers."""

PUBLISHED = "published"
"""Value of `use_raw`: `.raw` if there is one, whatever it holds, as in the published package."""

_SAMPLED_BLOCKS, _SAMPLED_ROWS = 3, 128
"""Rows that tell what kind of values a matrix holds."""

_MAX_LOG = 30.0
"""Logarithms of counts are lower; among counts of hundreds of cells, some are higher."""

_MAX_EXACT = 2**24
"""Count above which float32 does not hold every whole number."""

_MIN_WHOLE = 0.1
"""Share of whole numbers above which values are corrected counts; hardly any normalized value is whole."""

_MIN_MULTIPLES = 0.9
"""Share of values that are whole multiples of their cell's smallest one, above which a matrix is normalized."""


class Kind(StrEnum):
    """What the values of a matrix are, in words for messages."""

    WHOLE = "whole numbers"
    BINARY = "0 and 1 only"
    LOG = "log-normalized"
    NORMALIZED = "normalized"
    SCALED = "scaled, some negative"
    FRACTIONAL = "not whole numbers"


@dataclass(frozen=True)
class Place:
    """A matrix of an input, and the metadata of its columns.

    Attributes
    ----------
    source
        Name of the input, for messages.
    name
        As in messages, such as .raw.X or layers['counts'].
    open_matrix, read_var
        Functions that open the matrix and read its `var`.
    """

    source: str
    name: str
    open_matrix: Callable[[], Matrix]
    read_var: Callable[[], pd.DataFrame]

    @cached_property
    def matrix(self) -> Matrix:
        """The matrix, opened once."""
        return self.open_matrix()

    @cached_property
    def kind(self) -> "Kind":
        """Kind of the sampled values."""
        known = None if self.entries is None else _values_kind(self.entries)
        return kind_of(self.sample) if known is None else known

    @property
    def kind_without_loading(self) -> "Kind":
        """Kind of the sampled values; of a matrix by column, as far as its entries tell."""
        if self.entries is None:
            return self.kind
        return _values_kind(self.entries) or Kind.FRACTIONAL

    @cached_property
    def recovery(self) -> "Recovery | None":
        """How the counts of the sampled rows can be recovered; None if they cannot."""
        return recovery_of(self.sample)

    @cached_property
    def entries(self) -> np.ndarray | None:
        """Some entries of a matrix by column, of which rows take loading all of it; None: a matrix of another layout.

        Raises
        ------
        DataError
            If they cannot be read.
        """
        with _reading(self.source):
            return self.matrix.some_entries() if isinstance(self.matrix, ByColumn) else None

    def holds_the_same_as(self, other: "Place") -> bool | None:
        """Whether the samples of two matrices are equal; None if comparing them takes loading one."""
        if self.entries is None and other.entries is None:
            return not (self.sample != other.sample).nnz
        if self.entries is None or other.entries is None:
            return None
        return np.array_equal(self.entries, other.entries)

    @cached_property
    def sample(self) -> sparse.csr_array:
        """Some hundred rows, from the start, the middle and the end.

        Raises
        ------
        DataError
            If they cannot be read.
        """
        return sample_rows(self.matrix, self.source)


class Contents(NamedTuple):
    """What an input holds.

    Attributes
    ----------
    name
        Name of the input, for messages.
    places
        Matrices by key: `RAW`, `X`, or the name of a layer.
    obs
        Metadata of the cells.
    store
        The file or store, if there is one.
    """

    name: str
    places: dict[str, Place]
    obs: Metadata
    store: Store | None = None

    @property
    def usual_places(self) -> list[Place]:
        """The matrices that usually hold counts, in order of preference."""
        return [self.places[key] for key in (RAW, X, *COUNT_LAYERS) if key in self.places]


@dataclass(frozen=True)
class Recovery:
    """How values were made of counts, and so how to undo it.

    Attributes
    ----------
    base
        Base of the logarithm of value + 1; None: no logarithm.
    is_scaled
        Whether the counts of each cell were multiplied by a factor. Its smallest value then stands for a count of 1.
    """

    base: float | None
    is_scaled: bool

    def counts(self, rows: sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
        """Return whole numbers (entries,), float64, and a mask of those the values are equal to (entries,)."""
        with np.errstate(all="ignore"):  # damaged values may overflow; they are not exact
            values = rows.data.astype(np.float64)
            if self.base is not None:
                values = np.expm1(values * np.log(self.base))
            if self.is_scaled:
                lengths = np.diff(rows.indptr)
                filled = rows.indptr[:-1][lengths > 0]
                smallest = np.minimum.reduceat(values, filled) if len(filled) else np.zeros(0)
                values = values / np.repeat(smallest, lengths[lengths > 0])
            whole = np.rint(values)
            return whole, (np.abs(values - whole) <= _tolerance(whole)) & (whole < _MAX_EXACT)

    def describe(self) -> str:
        """Describe how counts are recovered, for the log."""
        base = "e" if self.base == np.e else f"{self.base:.0f}" if self.base else ""
        steps = [
            f"logarithms to base {base} undone" if base else "",
            "the smallest value of each cell taken as a count of 1" if self.is_scaled else "",
        ]
        return ", ".join(step for step in steps if step)


_RECOVERIES = (
    *(Recovery(base, is_scaled) for base in (np.e, 2.0, 10.0) for is_scaled in (False, True)),
    Recovery(None, is_scaled=True),
)


class Choice(NamedTuple):
    """The place with the counts, and why it was taken, for the log."""

    place: Place
    reason: str


def sample_rows(matrix: Matrix, source: str) -> sparse.csr_array:
    """Read rows from the start, the middle and the end of a matrix; `source` names the input, for messages."""
    n_rows = matrix.shape[0]
    last = max(0, n_rows - _SAMPLED_ROWS)
    starts = sorted({last * i // (_SAMPLED_BLOCKS - 1) for i in range(_SAMPLED_BLOCKS)})
    with _reading(source):
        parts = [to_canonical_csr(matrix.rows(start, min(start + _SAMPLED_ROWS, n_rows)), source) for start in starts]
    return sparse.csr_array(sparse.vstack(parts))


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Report whatever h5py and zarr raise on damaged data as DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise unreadable(source, error) from error


def kind_of(rows: sparse.csr_array) -> Kind:
    """Classify the values of some rows; whole numbers may be negative or not finite, which is reported elsewhere."""
    values = rows.data[np.isfinite(rows.data)]
    kind = _values_kind(values)
    if kind is not None:
        return kind
    recovery = recovery_of(rows)
    if recovery is not None and recovery.base is not None:  # log2(count + 1) of counts of 1 is whole, too
        return Kind.LOG
    if (values == np.rint(values)).mean() > _MIN_WHOLE:
        return Kind.FRACTIONAL
    if values.max() < _MAX_LOG:
        return Kind.LOG if recovery is None else Kind.NORMALIZED
    _, is_multiple = Recovery(None, is_scaled=True).counts(rows)
    return Kind.NORMALIZED if is_multiple.mean() > _MIN_MULTIPLES else Kind.FRACTIONAL


def _values_kind(values: np.ndarray) -> Kind | None:
    """Return the kind if the values tell it by themselves, without knowing their cells."""
    values = values[np.isfinite(values) & (values != 0)]
    if (values == np.rint(values)).all():
        return Kind.BINARY if len(values) == 0 or (values.min(), values.max()) == (1, 1) else Kind.WHOLE
    return Kind.SCALED if values.min() < 0 else None


def recovery_of(rows: sparse.csr_array) -> Recovery | None:
    """Return how the counts of all rows can be recovered exactly; None if they cannot."""
    return next((recovery for recovery in _RECOVERIES if recovery.counts(rows)[1].all()), None)


def _tolerance(whole: np.ndarray) -> np.ndarray:
    """Return how far float32 rounding moves multiples: relative to their size, below half a count."""
    return np.minimum(1e-3 + 2e-5 * whole, 0.25)


def choose_place(contents: Contents, layer: str | None, use_raw: bool | str | None) -> Choice:
    """Choose the matrix with the counts.

    Parameters
    ----------
    layer
        Layer to take.
    use_raw
        True: `.raw.X`; False: `.X`; "published": `.raw.X` if present, else `.X`; None or "auto": the first of `.raw.X`,
        `.X` and layers named like counts that holds whole numbers.

    Raises
    ------
    UsageError
        If both a layer and `.raw` are requested.
    DataError
        If there is no such matrix, or `auto` finds only normalized values.
    """
    if layer is not None and use_raw is True:
        raise UsageError(f"layer {layer!r} and use_raw=True are mutually exclusive; use only one of them")
    places = contents.places
    if layer is not None:
        layers = [name for name in places if name not in (RAW, X)]
        if layer not in layers:
            raise DataError(f"{contents.name}: has no layer {layer!r}; its layers are: {', '.join(layers) or 'none'}")
        return Choice(places[layer], "as set by --layer")
    if use_raw is True and RAW not in places:
        raise DataError(f"{contents.name}: has no .raw; remove --use-raw true (or set it to false) to use .X")
    if use_raw is True or (use_raw == PUBLISHED and RAW in places):
        return Choice(places[RAW], f"as set by --use-raw {str(use_raw).lower()}")
    if use_raw is False or use_raw == PUBLISHED:
        if X not in places:
            raise DataError(f"{contents.name}: has no matrix X")
        return Choice(places[X], f"as set by --use-raw {str(use_raw).lower()}")
    return _choose_by_values(contents)


def _choose_by_values(contents: Contents) -> Choice:
    places = contents.usual_places
    if not places:
        layers = ", ".join(contents.places) or "none"
        raise DataError(f"{contents.name}: has no matrix X; its layers are: {layers}; name one with --layer")
    for i, place in enumerate(places):
        if place.kind_without_loading == Kind.WHOLE:
            _warn_if_different(place, places[i + 1 :])
            return Choice(place, "; ".join(f"{before.name} is {before.kind_without_loading}" for before in places[:i]))
    no_more = "no matrix holds more" if len(places) > 1 else ""
    for kind, reason in ((Kind.FRACTIONAL, "no matrix holds whole numbers"), (Kind.BINARY, no_more)):
        for place in places:
            if place.kind == kind:
                return Choice(place, reason)
    raise DataError(f"{contents.name}: {_describe_lack(contents)}")


def _warn_if_different(chosen: Place, others: Sequence[Place]) -> None:
    """Warn if another matrix of the same shape holds other whole numbers; unreadable ones are not needed."""
    for other in others:
        with suppress(DataError):
            is_same_shape = other.matrix.shape == chosen.matrix.shape
            if is_same_shape and other.kind_without_loading == Kind.WHOLE and chosen.holds_the_same_as(other) is False:
                logger.warning(
                    "%s: %s and %s hold different whole numbers; taking %s (choose with --use-raw or --layer)",
                    *(chosen.source, chosen.name, other.name, chosen.name),
                )


def _describe_lack(contents: Contents) -> str:
    """Say what is where, and what to do."""
    places = contents.usual_places
    found = ", ".join(f"{place.name} is {_with_question(place.kind)}" for place in places)
    others = [f"layers[{key!r}]" for key in contents.places if key not in (RAW, X, *COUNT_LAYERS)]
    more = f"; not looked at: {', '.join(others)} (name one with --layer)" if others else ""
    is_exact = any(place.recovery is not None for place in places)
    recover = "; the counts can be read off exactly: add --recover-counts" if is_exact else ""
    return (
        f"no raw counts: {found}{more}{recover}; the model needs whole numbers of molecules or reads (to embed these "
        "values anyway, set --use-raw true or false)"
    )


def _with_question(kind: Kind) -> str:
    return f"{kind}?" if kind == Kind.LOG else str(kind)


def recoverable_place(
    contents: Contents, layer: str | None, use_raw: bool | str | None
) -> tuple[Choice, Recovery | None]:
    """Choose a matrix as `choose_place`, or one whose counts can be recovered, and how; whole numbers stay as they are.

    Raises
    ------
    UsageError, DataError
        As `choose_place`, or if counts cannot be recovered.
    """
    if layer is None and use_raw in (None, AUTO):
        places = contents.usual_places
    else:
        places = [choose_place(contents, layer, use_raw).place]
    if not places or any(place.kind_without_loading == Kind.WHOLE for place in places):
        return choose_place(contents, layer, use_raw), None
    for place in places:
        if place.kind != Kind.BINARY and (recovery := place.recovery) is not None:
            return Choice(place, f"counts recovered from {place.kind} values: {recovery.describe()}"), recovery
    if any(place.kind == Kind.BINARY for place in places):
        return choose_place(contents, layer, use_raw), None
    raise DataError(
        f"{contents.name}: --recover-counts: no values are whole multiples of each cell's smallest one; use raw counts"
    )
