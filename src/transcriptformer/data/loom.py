"""Loom files, whose matrices have one row per gene and one column per cell."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from transcriptformer.data.counts import Matrix, native
from transcriptformer.data.metadata import Metadata, MetadataInMemory, StoredMetadata
from transcriptformer.data.places import COUNT_LAYERS, Contents, Place, X
from transcriptformer.data.store import Store

GROUPS = ("matrix", "row_attrs", "col_attrs")

_CELL_NAMES, _GENE_NAMES = ("CellID", "obs_names"), ("var_names", "Gene")
"""Attributes that are used as index, in order of preference."""


class StoredTransposed:
    """`Matrix` of a dense matrix of genes and cells in a file."""

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key
        n_genes, n_cells = store[key].shape
        self.shape: tuple[int, ...] = n_cells, n_genes

    def rows(self, start: int, stop: int) -> Any:  # noqa: D102
        return native(self.store[self.key][:, start:stop]).T


def contents_of_loom(store: Store) -> Contents:
    """Return what a loom file holds."""
    n_genes, n_cells = store["matrix"].shape
    var = _attributes(store, "row_attrs", _GENE_NAMES, n_genes)
    obs = _attributes(store, "col_attrs", _CELL_NAMES, n_cells)
    keys = {X: "matrix", **{name: f"layers/{name}" for name in store.names_in("layers", COUNT_LAYERS)}}
    places = {
        name: Place(store.name, f"/{key}", partial(_open, store, key), lambda: var.rows(0, len(var)))
        for name, key in keys.items()
    }
    return Contents(store.name, places, obs, store)


def _attributes(store: Store, key: str, names: tuple[str, str], n_rows: int) -> Metadata:
    """Open the attributes that have one value per row or column; without names, they are numbered."""
    columns = [str(name) for name, values in store[key].items() if getattr(values, "ndim", 0) == 1]
    index = next((name for name in names if name in columns), None)
    if index is not None:
        return StoredMetadata(store, key, index, [column for column in columns if column != index])
    numbers = pd.Index(np.arange(n_rows).astype(str).astype(object))
    if not columns:
        return MetadataInMemory(pd.DataFrame(index=numbers))
    frame = StoredMetadata(store, key, columns[0], columns).rows(0, n_rows)
    return MetadataInMemory(frame.set_axis(numbers[: len(frame)]))


def _open(store: Store, key: str) -> Matrix:
    with store.reading():
        return StoredTransposed(store, key)
