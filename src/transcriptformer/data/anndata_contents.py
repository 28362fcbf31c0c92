"""Contents of an AnnData: in memory, backed, in an h5ad file or in a zarr store."""

import logging
import warnings
from functools import partial
from typing import Any

import anndata
import pandas as pd

from transcriptformer.data.counts import Matrix, matrix_of, open_matrix
from transcriptformer.data.genes import ID_COLUMNS
from transcriptformer.data.metadata import ColumnError, Metadata, MetadataInMemory, open_metadata
from transcriptformer.data.places import COUNT_LAYERS, RAW, Contents, Place, X
from transcriptformer.data.store import Store
from transcriptformer.errors import DataError
from transcriptformer.runtime.isolated import exhaust
from transcriptformer.storage.external import Guard

logger = logging.getLogger(__name__)


def contents_of_adata(adata: anndata.AnnData, name: str, allow_external: bool) -> Contents:
    """Return what an AnnData holds, which may be backed."""
    if adata.isbacked:
        _check_backed(adata, name, allow_external)
    places = {}
    if adata.raw is not None:
        places[RAW] = Place(name, RAW, lambda: _in_memory(adata.raw.X, name), lambda: adata.raw.var)
    if adata.X is not None:
        places[X] = Place(name, X, lambda: _in_memory(adata.X, name), lambda: adata.var)
    for key in adata.layers:
        if key is not None:
            places[key] = Place(
                name, f"layers[{key!r}]", partial(_layer_in_memory, adata, key, name), lambda: adata.var
            )
    return Contents(name, places, MetadataInMemory(adata.obs))


def _layer_in_memory(adata: anndata.AnnData, key: str, name: str) -> Matrix:
    return _in_memory(adata.layers[key], name)


def _check_backed(adata: anndata.AnnData, name: str, allow_external: bool) -> None:
    """Check the matrices in the file of a backed AnnData."""
    if not adata.file.is_open:
        adata.file.open()
    guard = Guard(name, allow_external)
    for key in ("X", "raw/X"):
        if guard.contains(adata.file["/"], key):
            exhaust(guard.steps(guard.open(adata.file["/"], key), key))


def _in_memory(values: Any, name: str) -> Matrix:
    try:
        return matrix_of(values)
    except ValueError as error:
        raise DataError(f"{name}: damaged: the sparse matrix of counts is inconsistent ({error})") from error


def contents_of_store(store: Store) -> Contents:
    """Return what the AnnData in a store holds."""
    if _is_old_layout(store):
        return _contents_of_old_layout(store)
    places = {}
    for name, key, var in _matrices(store):
        places[name] = Place(
            store.name,
            name if name in (RAW, X) else f"layers[{name!r}]",
            partial(_open, store, key),
            partial(_read_frame, store, var),
        )
    return Contents(store.name, places, open_metadata(store, "obs"), store)


def _contents_of_old_layout(store: Store) -> Contents:
    store.check("")
    store.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's advice to rewrite the file
        return contents_of_adata(anndata.read_h5ad(store.path), store.name, store.allow_external)


def _matrices(store: Store) -> list[tuple[str, str, str]]:
    """List the matrices of a store: the key of the place, and the paths of the matrix and its var."""
    found = []
    if "raw/X" in store:  # zarr stores may have an empty `raw`
        found.append((RAW, "raw/X", "raw/var"))
    if "X" in store:
        found.append((X, "X", "var"))
    return found + [(name, f"layers/{name}", "var") for name in store.names_in("layers", COUNT_LAYERS)]


def _open(store: Store, key: str) -> Any:
    with store.reading():
        return open_matrix(store, key)


def _read_frame(store: Store, key: str) -> pd.DataFrame:
    with store.reading():
        frame = open_metadata(store, key)
        try:
            return frame.rows(0, len(frame))
        except ColumnError as error:
            if error.column is None:
                raise
    return _read_valid_columns(store, frame)


def _read_valid_columns(store: Store, frame: Metadata) -> pd.DataFrame:
    """Read the columns that can be read, and name the others in warnings; gene ids must be among the first."""
    columns = [frame.rows(0, len(frame), [])]
    for column in frame.columns:
        try:
            with store.reading():
                columns.append(frame.rows(0, len(frame), [column]))
        except ColumnError as error:
            if column in ID_COLUMNS:  # other columns may hold other genes
                raise
            logger.warning("%s; left out", error)
    return pd.concat(columns, axis=1)


def _is_old_layout(store: Store) -> bool:
    """Whether the file was written by anndata < 0.7, with data frames as HDF5 tables and a key `raw.X`."""
    return not store.group and ("raw.X" in store or any(hasattr(store[frame], "shape") for frame in ("obs", "var")))
