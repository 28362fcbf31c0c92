"""Count matrices of any layout, in memory or in a file, read in blocks of consecutive rows."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Protocol

import anndata
import numpy as np
from scipy import sparse

from transcriptformer.data.store import Store, attribute, unreadable
from transcriptformer.errors import DataError
from transcriptformer.runtime.memory import available_memory

logger = logging.getLogger(__name__)

_SAMPLED_ENTRIES = 65_536
"""Length of the runs of entries that tell what a matrix by column holds."""


class Matrix(Protocol):
    """Count matrix (cells, genes).

    Attributes
    ----------
    shape
        Number of cells and of genes.
    """

    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Any:
        """Return rows `start:stop`, sparse or dense, in their stored dtype."""
        ...


class MatrixInMemory:
    """`Matrix` of a SciPy matrix, a NumPy array or the matrix of a backed AnnData, none of them CSC."""

    def __init__(self, values: Any) -> None:
        if sparse.issparse(values):
            check_sparse(values)  # SciPy may crash on out-of-range indices
        self.values, self.shape = values, tuple(values.shape)

    def rows(self, start: int, stop: int) -> Any:  # noqa: D102
        return self.values[start:stop]


class LoadedWhole(ABC):
    """`Matrix` whose rows are slow to read one block after the other, so that it is loaded before cells are read.

    Parameters
    ----------
    shape
        Number of cells and of genes.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    @cached_property
    def in_memory(self) -> MatrixInMemory:
        """The loaded matrix."""
        return MatrixInMemory(self._load())

    @abstractmethod
    def _load(self) -> Any:
        """Read the matrix as CSR."""

    def rows(self, start: int, stop: int) -> Any:  # noqa: D102
        return self.in_memory.rows(start, stop)


class ByColumn(LoadedWhole):
    """`Matrix` stored by column (CSC).

    Parameters
    ----------
    open_entries, read
        Functions that return the stored values (entries,), in a file or in memory, and the matrix as CSC.
    """

    def __init__(self, shape: tuple[int, ...], open_entries: Callable[[], Any], read: Callable[[], Any]) -> None:
        super().__init__(shape)
        self._open_entries, self._read = open_entries, read

    def some_entries(self) -> np.ndarray:
        """Return entries (entries,) from the start, the middle and the end, without loading the matrix."""
        entries = self._open_entries()
        last = max(0, entries.shape[0] - _SAMPLED_ENTRIES)
        starts = sorted({0, last // 2, last})
        return np.concatenate([native(entries[start : start + _SAMPLED_ENTRIES]) for start in starts])

    def _load(self) -> sparse.csr_matrix:
        values = self._read()
        check_sparse(values)  # SciPy may crash on out-of-range indices
        return values.tocsr()


def matrix_of(values: Any) -> Matrix:
    """Return the `Matrix` of a SciPy matrix, a NumPy array or the matrix of a backed AnnData."""
    if getattr(values, "format", None) != "csc":
        return MatrixInMemory(values)
    if sparse.issparse(values):
        check_sparse(values)  # before its entries are taken for counts
        return ByColumn(tuple(values.shape), lambda: values.data, lambda: values)
    return ByColumn(tuple(values.shape), lambda: values.group["data"], values.to_memory)


def loaded(matrix: Matrix) -> Matrix:
    """Return a matrix in memory, with all rows of the given one."""
    if isinstance(matrix, LoadedWhole):
        return matrix.in_memory
    if isinstance(matrix, MatrixInMemory) and isinstance(matrix.values, np.ndarray | sparse.spmatrix | sparse.sparray):
        return matrix
    return MatrixInMemory(matrix.rows(0, matrix.shape[0]))


class StoredDense:
    """`Matrix` of a dense matrix in a file."""

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key
        self.shape = tuple(store[key].shape)

    def rows(self, start: int, stop: int) -> np.ndarray:  # noqa: D102
        return np.asarray(self.store[self.key][start:stop])


class StoredCsr:
    """`Matrix` of a CSR matrix in a file; a block of rows takes one contiguous read per array.

    Parameters
    ----------
    shape
        Number of cells and of genes; None: as in the attributes of the group.
    """

    def __init__(self, store: Store, key: str, shape: tuple[int, int] | None = None) -> None:
        self.store, self.key = store, key
        group = store[key]
        self.shape: tuple[int, ...] = shape or _sparse_shape(group)
        lengths = {name: group[name].shape[0] for name in ("data", "indices", "indptr")}
        n_entries = int(group["indptr"][-1])
        if lengths != {"data": n_entries, "indices": n_entries, "indptr": self.shape[0] + 1}:
            raise DataError(f"{store.name}: damaged: {key} of shape {self.shape} has arrays of lengths {lengths}")
        if group["indptr"][0] != 0:
            raise DataError(f"{store.name}: damaged: indptr of {key} does not start at 0")

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:  # noqa: D102
        group = self.store[self.key]
        indptr = np.asarray(group["indptr"][start : stop + 1]).astype(np.int64)
        first, last = int(indptr[0]), int(indptr[-1])
        if not 0 <= first <= last <= group["data"].shape[0]:
            raise ValueError(f"indptr of rows {start} to {stop} is invalid: {first} to {last}")
        data, indices = native(group["data"][first:last]), native(group["indices"][first:last])
        return sparse.csr_matrix((data, indices, indptr - first), shape=(stop - start, self.shape[1]))


class ColumnSubset:
    """`Matrix` of some columns of another one.

    Parameters
    ----------
    matrix
        Matrix whose rows are CSR.
    columns
        Indices of the columns (genes,).
    """

    def __init__(self, matrix: Matrix, columns: np.ndarray) -> None:
        self.matrix, self.columns = matrix, columns
        self.shape: tuple[int, ...] = matrix.shape[0], len(columns)

    def rows(self, start: int, stop: int) -> Any:  # noqa: D102
        block = self.matrix.rows(start, stop)
        check_sparse(block)  # SciPy may crash on out-of-range indices
        return block[:, self.columns]


def native(values: Any) -> np.ndarray:
    """Return numbers in a type that SciPy can compute with: native byte order, and no float16."""
    array = np.asarray(values)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _sparse_shape(group: Any) -> tuple[int, ...]:
    shape = attribute(group, "shape", None)
    return tuple(int(n) for n in (attribute(group, "h5sparse_shape") if shape is None else shape))


def _layout(element: Any) -> str:
    """Return the layout of a stored matrix: array, csr, csc or what its encoding says."""
    if not hasattr(element, "keys"):
        return "array"
    kind = attribute(element, "encoding-type") or attribute(element, "h5sparse_format")
    for layout in ("csr", "csc"):
        if kind in (layout, f"{layout}_matrix"):
            return layout
    if kind == "" and "indptr" in element:  # files without encodings: rows or columns, by the number of pointers
        n_pointers, shape = element["indptr"].shape[0] - 1, _sparse_shape(element)
        return "csr" if n_pointers == shape[0] else "csc"
    return str(kind)


def open_matrix(store: Store, key: str) -> Matrix:
    """Open the matrix under `key`.

    Nothing is loaded yet.

    Raises
    ------
    DataError
        If the matrix is damaged or of an unknown kind.
    """
    try:
        element = store[key]
        layout = _layout(element)
        if layout == "csc":
            return ByColumn(_sparse_shape(element), lambda: store[key]["data"], partial(_read_csc, store, key))
        if layout == "csr":
            return StoredCsr(store, key)
        return StoredDense(store, key) if layout == "array" else MatrixInMemory(anndata.io.read_elem(element))
    except DataError:
        raise
    except Exception as error:  # on damaged data, h5py, zarr and anndata may raise anything
        raise unreadable(store.name, error) from error


def _read_csc(store: Store, key: str) -> sparse.csc_matrix:
    group = store[key]
    _check_csc_memory(store.name, group)
    arrays = native(group["data"][:]), native(group["indices"][:]), native(group["indptr"][:])
    return sparse.csc_matrix(arrays, shape=_sparse_shape(group))


def _check_csc_memory(name: str, group: Any) -> None:
    n_entries = group["data"].shape[0]
    needed = 2 * n_entries * (group["data"].dtype.itemsize + group["indices"].dtype.itemsize)  # as CSC and as CSR
    action = f"{name}: counts are stored by column (CSC); converting them to CSR"
    check_memory(needed, action, "store them by row: adata.X = adata.X.tocsr()", max_share=0.5)
    logger.warning("%s: counts are stored by column (CSC); loading the whole matrix to convert it to CSR", name)


def check_memory(needed: int, action: str, advice: str, max_share: float = 0.8) -> None:
    """Raise DataError if an action needs more bytes than a share of the free memory; `advice` says what to do then."""
    available = available_memory()
    if needed > max_share * available:
        raise DataError(
            f"{action} takes {needed / 2**30:.1f} GiB of memory, but only {available / 2**30:.1f} GiB are free; "
            f"{advice}"
        )


def to_canonical_csr(values: Any, name: str = "the AnnData") -> sparse.csr_array:
    """Convert a CSR, CSC or dense matrix to float32 CSR with sorted indices, no duplicates and no explicit zeros.

    `values` is not modified.

    Raises
    ------
    DataError
        If `values` is of another kind, not numeric, or has out-of-range indices.
    """
    is_matrix = bool(sparse.issparse(values)) or isinstance(values, np.ndarray)
    if not is_matrix or values.dtype.kind not in "biuf":
        kind = f"{type(values).__name__} of {getattr(values, 'dtype', 'no type')}"
        raise DataError(f"{name}: counts are a {kind}; expected numbers in a CSR, CSC or dense array")
    try:
        check_sparse(values)
        matrix = sparse.csr_array(values, dtype=np.float32)
    except ValueError as error:
        raise DataError(f"{name}: damaged: the sparse matrix of counts is inconsistent ({error})") from error
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    if not matrix.data.all():
        matrix = matrix.copy()
        matrix.eliminate_zeros()
    return matrix


def check_sparse(values: Any) -> None:
    """Raise ValueError if a CSR or CSC matrix has inconsistent or out-of-range indices."""
    if getattr(values, "format", "dense") in ("csr", "csc"):
        arrays = values.data, values.indices, values.indptr
        type(values)(arrays, shape=values.shape).check_format(full_check=True)  # may replace the arrays
