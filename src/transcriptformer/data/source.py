"""Sources of cells, in files, stores or AnnData objects: counts in blocks, gene ids and metadata."""

import logging
import re
import warnings
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from transcriptformer.config import MAX_INT
from transcriptformer.data.counts import Matrix, MatrixInMemory, open_matrix, to_canonical_csr
from transcriptformer.data.metadata import Metadata, MetadataInMemory, open_metadata
from transcriptformer.data.store import Location, Store, unreadable
from transcriptformer.errors import DataError, UsageError
from transcriptformer.runtime.isolated import exhaust
from transcriptformer.storage.external import Guard

logger = logging.getLogger(__name__)

DEFAULT_GENE_COLUMN, AUTO_GENE_COLUMN = "ensembl_id", "auto"

# Ensembl (ENSG…, ENSMUSG…), FlyBase, WormBase and systematic yeast names.
_GENE_ID = re.compile(r"(ENS[A-Z]*G\d{6,}|FBgn\d{6,}|WBGene\d{6,}|Y[A-P][LR]\d{3}[WC](-[A-Z])?)(\.\d+)?")


class CellSource:
    """Cells of one file or AnnData.

    Attributes
    ----------
    name
        Name of the file in messages.
    gene_ids
        Gene id of each column (genes,), without version; empty if missing.
    is_duplicate
        Mask of columns whose gene id occurs in an earlier column (genes,), bool.
    obs
        Metadata of the cells.
    """

    def __init__(
        self, name: str, matrix: Matrix, gene_ids: np.ndarray, obs: Metadata, store: Store | None = None
    ) -> None:
        self.name, self.matrix, self.gene_ids, self.obs, self.store = name, matrix, gene_ids, obs, store
        self.is_duplicate = pd.Index(gene_ids).duplicated() & (gene_ids != "")

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def close(self) -> None:
        """Close the file; the next read reopens it."""
        if self.store is not None:
            self.store.close()

    def counts(self, start: int, stop: int) -> sparse.csr_array:
        """Read the counts (cells, genes), float32, of cells `start:stop` with `to_canonical_csr`.

        Raises
        ------
        DataError
            If they cannot be read, are negative or not finite.
        """
        try:
            values = self.matrix.rows(start, stop)
        except DataError:
            raise
        except Exception as error:  # on damaged data, h5py and zarr may raise anything
            raise unreadable(self.name, error) from error
        matrix = to_canonical_csr(values, self.name)
        self._check(matrix, start)
        return matrix

    def _check(self, matrix: sparse.csr_array, start: int) -> None:
        counts = matrix.data
        if np.isfinite(counts).all() and counts.min(initial=0) >= 0:
            return
        for is_bad, kind in ((~np.isfinite(counts), "NaN or infinite"), (counts < 0, "negative")):
            if is_bad.any():
                entry = int(is_bad.argmax())
                row = start + int(np.searchsorted(matrix.indptr, entry, side="right")) - 1
                cell = self.obs.rows(row, row + 1, []).index[0]
                raise DataError(
                    f"{self.name}: counts are {kind}, first in cell {cell!r} (row {row}), "
                    f"gene {self.gene_ids[matrix.indices[entry]]}: {counts[entry]}; expected raw counts"
                )


def open_source(
    source: Location | anndata.AnnData,
    gene_col_name: str = DEFAULT_GENE_COLUMN,
    use_raw: bool | str | None = None,
    remove_duplicate_genes: bool = False,
    read_in_blocks: bool = True,
    layer: str | None = None,
    allow_external_links: bool = False,
) -> CellSource:
    """Locate counts, gene ids and cell metadata, and check that their shapes match, without checking counts.

    Parameters
    ----------
    source
        h5ad file or zarr store, of which only `obs` and one matrix with its `var` are read; or an AnnData, which is
        not modified.
    gene_col_name
        Column of `var` with the gene ids; `index` for the index of `var`; `auto` for the index if it looks like
        gene ids and there is no `ensembl_id`, else `ensembl_id`.
    use_raw
        True: `.raw`; False: `.X`; None or "auto": `.raw` if there is one. Gene ids and counts come from the same place.
    remove_duplicate_genes
        Keep the first column of each gene id instead of raising an error.
    read_in_blocks
        Read counts on demand instead of loading them now.
    layer
        Layer to read the counts from, with `var`.
    allow_external_links
        Follow links to other files, virtual datasets and URLs that lead to other URLs.

    Raises
    ------
    UsageError
        If the file does not exist, or both a layer and `.raw` are requested.
    DataError
        If it cannot be read, has no cells or genes, lacks the layer or column, or has duplicate genes.
    """
    if layer is not None and use_raw is True:
        raise UsageError(f"layer {layer!r} and use_raw=True are mutually exclusive; use only one of them")
    if isinstance(source, anndata.AnnData):
        name = "the AnnData"
        found = _from_anndata(source, use_raw, read_in_blocks, layer, name, allow_external_links)
    else:
        name = str(source)
        found = _from_store(source, use_raw, read_in_blocks, layer, allow_external_links)
    shape = len(found.obs), len(found.var)
    if 0 in shape:
        raise DataError(f"{name}: contains no {'cells' if shape[0] == 0 else 'genes'}")
    if max(shape) > MAX_INT:
        raise DataError(f"{name}: declares {shape[0]:,} cells and {shape[1]:,} genes; at most {MAX_INT:,} can be read")
    if found.matrix.shape != shape:
        raise DataError(
            f"{name}: damaged: counts of shape {found.matrix.shape} for {shape[0]} cells and {shape[1]} genes"
        )
    column = _choose_gene_column(found.var) if gene_col_name == AUTO_GENE_COLUMN else gene_col_name
    gene_ids = _without_versions(_gene_column(found, column, name))
    cells = CellSource(name, found.matrix, gene_ids, found.obs, found.store)
    _check_duplicates(cells, column, remove_duplicate_genes)
    return cells


class _Found(NamedTuple):
    """Counts with the metadata of their genes and cells, and their store."""

    matrix: Matrix
    var: pd.DataFrame
    obs: Metadata
    is_raw: bool
    store: Store | None = None


def _from_anndata(
    adata: anndata.AnnData,
    use_raw: bool | str | None,
    read_in_blocks: bool,
    layer: str | None,
    name: str,
    allow_external: bool,
) -> _Found:
    if adata.isbacked:
        _check_backed(adata, name, allow_external)
    obs = MetadataInMemory(adata.obs)
    if layer is not None:
        _check_layer(layer, adata.layers, name)
        return _Found(_in_memory(adata.layers[layer], read_in_blocks, name), adata.var, obs, is_raw=False)
    if _choose_raw(adata.raw is not None, use_raw, name):
        return _Found(_in_memory(adata.raw.X, read_in_blocks, name), adata.raw.var, obs, is_raw=True)
    if adata.X is None:
        raise DataError(f"{name}: has no matrix X")
    return _Found(_in_memory(adata.X, read_in_blocks, name), adata.var, obs, is_raw=False)


def _check_layer(layer: str, layers: Iterable[str], name: str) -> None:
    if layer not in layers:
        raise DataError(f"{name}: has no layer {layer!r}; its layers are: {', '.join(layers) or 'none'}")


def _check_backed(adata: anndata.AnnData, name: str, allow_external: bool) -> None:
    """Check the matrices in the file of a backed AnnData."""
    if not adata.file.is_open:
        adata.file.open()
    guard = Guard(name, allow_external)
    for key in ("X", "raw/X"):
        if guard.contains(adata.file["/"], key):
            exhaust(guard.steps(guard.open(adata.file["/"], key), key))


def _in_memory(values: Any, read_in_blocks: bool, name: str) -> MatrixInMemory:
    try:
        return MatrixInMemory(values, read_in_blocks)
    except ValueError as error:
        raise DataError(f"{name}: damaged: the sparse matrix of counts is inconsistent ({error})") from error


def _from_store(
    location: Location, use_raw: bool | str | None, read_in_blocks: bool, layer: str | None, allow_external: bool
) -> _Found:
    store = Store(location, allow_external)
    with store.reading():
        if _is_old_layout(store):
            store.check("")
            store.close()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # anndata's advice to rewrite the file
                adata = anndata.read_h5ad(Path(location))
                return _from_anndata(adata, use_raw, True, layer, store.name, allow_external)
        # Zarr stores may have an empty `raw`.
        is_raw = layer is None and _choose_raw("raw/X" in store, use_raw, store.name)
        place = "raw/" if is_raw else ""
        key = f"{place}X" if layer is None else f"layers/{layer}"
        if layer is not None and (not layer.strip(".") or "/" in layer or key not in store):
            layers: Any = "layers" in store and store["layers"]
            _check_layer(layer, layers or (), store.name)
        if key not in store:
            raise DataError(f"{store.name}: has no matrix {key}")
        matrix = open_matrix(store, key, read_in_blocks)
        var, obs = anndata.io.read_elem(store[f"{place}var"]), open_metadata(store, "obs")
        return _Found(matrix, var, obs, is_raw, store)


def _is_old_layout(store: Store) -> bool:
    """Whether the file was written by anndata < 0.7, with data frames as HDF5 tables and a key `raw.X`."""
    return "raw.X" in store or any(hasattr(store[frame], "shape") for frame in ("obs", "var"))


def _choose_raw(has_raw: bool, use_raw: bool | str | None, name: str) -> bool:
    if use_raw is True and not has_raw:
        raise DataError(f"{name}: has no .raw; remove --use-raw true (or set it to false) to use .X")
    return has_raw if use_raw in (None, "auto") else bool(use_raw)


def _choose_gene_column(var: pd.DataFrame) -> str:
    return "index" if DEFAULT_GENE_COLUMN not in var.columns and looks_like_gene_ids(var.index) else DEFAULT_GENE_COLUMN


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
    where = "raw.var (--use-raw false uses X and var instead)" if found.is_raw else "var"
    raise DataError(f"{name}: {where} has no column {column!r}; its columns are: {columns}{hint}")


def looks_like_gene_ids(values: Iterable[object]) -> bool:
    """Whether most of the first hundred `values` look like gene ids, such as ENSG00000139618.19."""
    first = [str(value) for value in islice(values, 100)]
    return sum(_GENE_ID.fullmatch(value) is not None for value in first) > len(first) / 2


def _without_versions(gene_ids: pd.Series | pd.Index) -> np.ndarray:
    """Strip everything after the first dot; missing ids become the empty string, which no vocabulary contains."""
    values = pd.Series(gene_ids, dtype=object)
    names = [str(gene) for gene in values.where(values.notna(), "")]
    if "." in "".join(names):
        names = [name.partition(".")[0] for name in names]
    return np.array(names, dtype=object)


def _check_duplicates(cells: CellSource, column: str, remove: bool) -> None:
    n_duplicates = int(cells.is_duplicate.sum())
    if n_duplicates and not remove:
        some = ", ".join(pd.unique(cells.gene_ids[cells.is_duplicate])[:5])
        advice = (
            "add --remove-duplicate-genes to keep the first of each"
            if looks_like_gene_ids(cells.gene_ids)
            else f"{column!r} does not look like Ensembl gene ids; set --gene-col-name to a column of var that does"
        )
        raise DataError(
            f"{cells.name}: {n_duplicates} columns have duplicate gene ids (without versions), e.g. {some}; {advice}"
        )
    if n_duplicates:
        logger.warning("%s: dropped %d columns with duplicate gene ids", cells.name, n_duplicates)
