"""A file or an AnnData becomes counts: a CSR matrix, the gene id of each column, and the cells' metadata."""

import logging
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from transcriptformer.errors import DataError, UsageError

logger = logging.getLogger(__name__)

# Ensembl (ENSG…, ENSMUSG…), FlyBase, WormBase and the systematic names of yeast.
_GENE_ID = re.compile(r"(ENS[A-Z]*G\d{6,}|FBgn\d{6,}|WBGene\d{6,}|Y[A-P][LR]\d{3}[WC](-[A-Z])?)(\.\d+)?")


@dataclass(frozen=True)
class Counts:
    """Counts of one file or AnnData.

    Attributes
    ----------
    matrix
        Counts (cells, genes), float32, finite and not negative; rows are sorted by column and hold no zeros.
    gene_ids
        Gene id of each column (genes,), without versions, unique; empty where the file has none.
    obs
        Metadata of the cells, as found.
    name
        The file, for messages.
    """

    matrix: sparse.csr_array
    gene_ids: np.ndarray
    obs: pd.DataFrame
    name: str


def read_counts(
    source: Path | anndata.AnnData,
    gene_col_name: str = "ensembl_id",
    use_raw: bool | str | None = None,
    remove_duplicate_genes: bool = False,
) -> Counts:
    """Read counts, gene ids and cell metadata, and check that a model can use them.

    Parameters
    ----------
    source
        An h5ad file, of which only `obs` and one matrix with its `var` are read; or an AnnData, which is left as it is.
    gene_col_name
        Column of `var` with the gene ids; `index` for the index of `var`.
    use_raw
        True: `.raw`; False: `.X`; None or "auto": `.raw` where there is one. Names and counts come from the same place.
    remove_duplicate_genes
        Keep the first column of each gene id instead of refusing duplicates.

    Raises
    ------
    UsageError
        If the file does not exist.
    DataError
        If it cannot be read, has no cells, no such column, duplicate genes, or counts that are negative or not finite.
    """
    if isinstance(source, anndata.AnnData):
        name = "the AnnData"
        found = _from_anndata(source, use_raw, name)
    else:
        name = str(source)
        found = _from_h5ad(source, use_raw)
    shape = len(found.obs), len(found.var)
    if 0 in shape:
        raise DataError(f"{name}: there are no {'cells' if shape[0] == 0 else 'genes'} in it")
    if getattr(found.values, "shape", shape) != shape:
        raise DataError(
            f"{name}: damaged: counts of shape {found.values.shape} for {shape[0]} cells and {shape[1]} genes"
        )
    gene_ids = _without_versions(_gene_column(found, gene_col_name, name))
    matrix = to_canonical_csr(found.values, name)
    _check_counts(matrix, found.obs, gene_ids, name)
    matrix, gene_ids = _without_duplicates(matrix, gene_ids, gene_col_name, remove_duplicate_genes, name)
    return Counts(matrix, gene_ids, found.obs, name)


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
        raise DataError(f"{name}: counts are a {kind}; numbers in CSR, CSC or a dense array in memory are needed")
    try:
        if getattr(values, "format", "dense") in ("csr", "csc"):
            values.check_format(full_check=True)
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


class _Found(NamedTuple):
    """Counts as they were found, with the metadata of their genes and cells, and where that is."""

    values: Any
    var: pd.DataFrame
    obs: pd.DataFrame
    is_raw: bool


def _from_anndata(adata: anndata.AnnData, use_raw: bool | str | None, name: str) -> _Found:
    if _choose_raw(adata.raw is not None, use_raw, name):
        return _Found(adata.raw.X, adata.raw.var, adata.obs, is_raw=True)
    if adata.X is None:
        raise DataError(f"{name}: has no matrix X")
    return _Found(adata.X, adata.var, adata.obs, is_raw=False)


def _from_h5ad(path: Path, use_raw: bool | str | None) -> _Found:
    # os.path answers False for an impossible name, where Path raises.
    if os.path.isdir(path):  # noqa: PTH112
        raise UsageError(f"--data-file {path}: is a folder, not an h5ad file")
    if not os.path.isfile(path):  # noqa: PTH113
        raise UsageError(f"--data-file {path}: no such file")
    if not h5py.is_hdf5(path):
        raise DataError(f"{path}: not an HDF5 file; an h5ad is needed (anndata's write_h5ad makes one)")
    try:
        with h5py.File(path) as file:
            if not {"obs", "var"} <= file.keys():
                raise DataError(f"{path}: HDF5, but not an AnnData (h5ad) file: 'obs' and 'var' are not in it")
            if not _is_old_layout(file):
                return _read_parts(file, use_raw, str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata advises to write the file anew
            return _from_anndata(anndata.read_h5ad(path), use_raw, str(path))
    except DataError:
        raise
    except Exception as error:  # h5py and anndata raise whatever a damaged file leads them to
        raise DataError(
            f"{path}: cannot be read: truncated or damaged, open in another program, or written by a newer anndata "
            f"({_one_line(error)})"
        ) from error


def _is_old_layout(file: h5py.File) -> bool:
    """Whether it was written by anndata before 0.7: data frames as tables, `.raw` beside `.X`."""
    return "raw.X" in file or any(isinstance(file[frame], h5py.Dataset) for frame in ("obs", "var"))


def _read_parts(file: h5py.File, use_raw: bool | str | None, name: str) -> _Found:
    """Read `obs` and one matrix with its `var`, and nothing else."""
    is_raw = _choose_raw("raw" in file, use_raw, name)
    place = "raw/" if is_raw else ""
    if f"{place}X" not in file:
        raise DataError(f"{name}: has no matrix {place}X")
    read = anndata.io.read_elem
    return _Found(read(file[f"{place}X"]), read(file[f"{place}var"]), read(file["obs"]), is_raw)


def _choose_raw(has_raw: bool, use_raw: bool | str | None, name: str) -> bool:
    if use_raw is True and not has_raw:
        raise DataError(f"{name}: has no .raw; leave out --use-raw true (or give false) to use .X")
    return has_raw if use_raw in (None, "auto") else bool(use_raw)


def _gene_column(found: _Found, column: str, name: str) -> pd.Series | pd.Index:
    var = found.var
    if column in var.columns:
        return var[column]
    if column in ("index", var.index.name):
        return var.index
    candidates = [c for c in var.columns if looks_like_gene_ids(var[c])]
    if looks_like_gene_ids(var.index):
        candidates.append("index")
    columns = ", ".join(map(str, var.columns)) or "none"
    hint = f"; {candidates[0]!r} looks like gene ids: add --gene-col-name {candidates[0]!r}" if candidates else ""
    where = "raw.var (--use-raw false takes X and var instead)" if found.is_raw else "var"
    raise DataError(f"{name}: {where} has no column {column!r}, its columns are: {columns}{hint}")


def looks_like_gene_ids(values: Iterable[object]) -> bool:
    """Whether most of the first hundred `values` have the form of a gene id, such as ENSG00000139618.19."""
    first = [str(value) for value in islice(values, 100)]
    return sum(_GENE_ID.fullmatch(value) is not None for value in first) > len(first) / 2


def _without_versions(gene_ids: pd.Series | pd.Index) -> np.ndarray:
    """Names up to the first dot; a missing one becomes the empty string, which no vocabulary has."""
    values = pd.Series(gene_ids, dtype=object)
    names = [str(gene) for gene in values.where(values.notna(), "")]
    if "." in "".join(names):
        names = [name.partition(".")[0] for name in names]
    return np.array(names, dtype=object)


def _check_counts(matrix: sparse.csr_array, obs: pd.DataFrame, gene_ids: np.ndarray, name: str) -> None:
    counts = matrix.data
    for is_bad, kind in ((~np.isfinite(counts), "NaN or infinite"), (counts < 0, "negative")):
        if is_bad.any():
            entry = int(is_bad.argmax())
            cell = obs.index[int(np.searchsorted(matrix.indptr, entry, side="right")) - 1]
            raise DataError(
                f"{name}: {int(is_bad.sum())} counts are {kind}, the first in cell {cell!r}, "
                f"gene {gene_ids[matrix.indices[entry]]}: {counts[entry]}; raw counts are needed"
            )
    if (counts != np.rint(counts)).any():
        logger.warning("%s: counts are not whole numbers; the model expects raw counts, not normalized ones", name)


def _without_duplicates(
    matrix: sparse.csr_array, gene_ids: np.ndarray, column: str, remove: bool, name: str
) -> tuple[sparse.csr_array, np.ndarray]:
    if len(set(gene_ids)) == len(gene_ids):
        return matrix, gene_ids
    repeated = pd.Index(gene_ids).duplicated() & (gene_ids != "")
    n_repeated = int(repeated.sum())
    if n_repeated and not remove:
        some = ", ".join(pd.unique(gene_ids[repeated])[:5])
        advice = (
            "add --remove-duplicate-genes to keep the first of each"
            if looks_like_gene_ids(gene_ids)
            else f"{column!r} does not look like Ensembl gene ids: name a column of var that does by --gene-col-name"
        )
        raise DataError(f"{name}: {n_repeated} columns repeat a gene id (versions dropped), such as {some}; {advice}")
    if n_repeated:
        logger.warning("%s: dropped %d columns that repeat a gene id", name, n_repeated)
        matrix, gene_ids = sparse.csr_array(matrix[:, np.flatnonzero(~repeated)]), gene_ids[~repeated]
    return matrix, gene_ids


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
