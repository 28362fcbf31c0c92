"""Matrices of counts, read in blocks of consecutive rows, whatever their layout and wherever they lie."""

import logging
from typing import Any, Protocol

import anndata
import h5py
import numpy as np
import psutil
from scipy import sparse

from transcriptformer.data.store import Store, damaged
from transcriptformer.errors import DataError

logger = logging.getLogger(__name__)


class Matrix(Protocol):
    """Counts (cells, genes).

    Attributes
    ----------
    shape
        How many cells and genes.
    """

    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Any:
        """The rows from `start` to before `stop`, sparse or dense, in the type they are stored in."""
        ...


class MatrixInMemory:
    """A SciPy matrix, a NumPy array, or what a backed AnnData has in their place, as `Matrix`.

    Parameters
    ----------
    values
        The counts.
    read_in_blocks
        Leave those of a backed AnnData in the file, unless they are stored by columns.
    """

    def __init__(self, values: Any, read_in_blocks: bool = True) -> None:
        is_csc = getattr(values, "format", None) == "csc"  # whose rows are slow to come by
        if hasattr(values, "to_memory") and (is_csc or not read_in_blocks):
            values = values.to_memory()
        if isinstance(values, h5py.Dataset) and not read_in_blocks:
            values = values[:]
        if sparse.issparse(values):
            check_sparse(values)  # now, for SciPy may crash where indices point outside
        if is_csc:
            values = values.tocsr()
        self.values, self.shape = values, tuple(values.shape)

    def rows(self, start: int, stop: int) -> Any:  # noqa: D102
        return self.values[start:stop]


class StoredDense:
    """A dense matrix in a file as `Matrix`."""

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key
        self.shape = tuple(store[key].shape)

    def rows(self, start: int, stop: int) -> np.ndarray:  # noqa: D102
        return np.asarray(self.store[self.key][start:stop])


class StoredCsr:
    """A CSR matrix in a file as `Matrix`; a block of rows is one contiguous read of each of its arrays."""

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key
        group = store[key]
        self.shape = tuple(int(n) for n in group.attrs["shape"])
        lengths = {name: group[name].shape[0] for name in ("data", "indices", "indptr")}
        n_entries = int(group["indptr"][-1])
        if lengths != {"data": n_entries, "indices": n_entries, "indptr": self.shape[0] + 1}:
            raise DataError(f"{store.name}: damaged: {key} of shape {self.shape} has arrays of lengths {lengths}")
        if group["indptr"][0] != 0:
            raise DataError(f"{store.name}: damaged: the entries of {key} do not begin with the first one")

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:  # noqa: D102
        group = self.store[self.key]
        indptr = np.asarray(group["indptr"][start : stop + 1]).astype(np.int64)
        first, last = int(indptr[0]), int(indptr[-1])
        if not 0 <= first <= last <= group["data"].shape[0]:
            raise ValueError(f"rows {start} to {stop} begin at entry {first} and end at {last}")
        data, indices = np.asarray(group["data"][first:last]), np.asarray(group["indices"][first:last])
        return sparse.csr_matrix((data, indices, indptr - first), shape=(stop - start, self.shape[1]))


def open_matrix(store: Store, key: str, read_in_blocks: bool) -> Matrix:
    """The matrix under `key`.

    With `read_in_blocks` it stays where it is, unless it is stored by columns (CSC): a row of such a matrix can only be
    had by reading all of it, so it is read into memory, if it fits there.

    Raises
    ------
    DataError
        If it is damaged, of an unknown kind, or stored by columns and too large for memory.
    """
    try:
        element = store[key]
        kind = str(element.attrs.get("encoding-type", "array"))
        if read_in_blocks and kind == "csr_matrix":
            return StoredCsr(store, key)
        if read_in_blocks and kind == "array":
            return StoredDense(store, key)
        if read_in_blocks and kind == "csc_matrix":
            _tell_of_columns(store.name, element)
        return MatrixInMemory(anndata.io.read_elem(element))
    except DataError:
        raise
    except Exception as error:  # h5py, zarr and anndata raise whatever damaged data leads them to
        raise damaged(store.name, error) from error


def _tell_of_columns(name: str, group: Any) -> None:
    n_entries = group["data"].shape[0]
    needed = 2 * n_entries * (group["data"].dtype.itemsize + group["indices"].dtype.itemsize)  # by columns and by rows
    available = psutil.virtual_memory().available
    if needed > 0.5 * available:
        raise DataError(
            f"{name}: counts are stored by columns (CSC); turning them takes {needed / 2**30:.1f} GiB of memory, of "
            f"which {available / 2**30:.1f} are free; store them by rows: adata.X = adata.X.tocsr()"
        )
    logger.warning("%s: counts are stored by columns (CSC); all of them are read into memory to have the rows", name)


def to_canonical_csr(values: Any, name: str = "the AnnData") -> sparse.csr_array:
    """Bring a matrix to float32 CSR with sorted columns, no repeated entries and no stored zeros.

    `values`, CSR, CSC or dense, stays as it is.

    Raises
    ------
    DataError
        If it is of another kind, does not hold numbers, or has indices outside its shape.
    """
    is_matrix = bool(sparse.issparse(values)) or isinstance(values, np.ndarray)
    if not is_matrix or values.dtype.kind not in "biuf":
        kind = f"{type(values).__name__} of {getattr(values, 'dtype', 'no type')}"
        raise DataError(f"{name}: counts are a {kind}; numbers in CSR, CSC or a dense array are needed")
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
    """Raise ValueError where a CSR or CSC matrix points outside itself."""
    if getattr(values, "format", "dense") in ("csr", "csc"):
        arrays = values.data, values.indices, values.indptr
        type(values)(arrays, shape=values.shape).check_format(full_check=True)  # which may replace the arrays
