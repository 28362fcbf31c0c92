"""Formats of inputs, told apart by content.

- AnnData: h5ad, which may be gzipped; zarr, which may be zipped or behind a URL
- MuData: h5mu or zarr, of which one modality is read
- Cell Ranger: .h5 of version 2 and 3, and folders with matrix.mtx
- loom
- TileDB-SOMA experiments
"""

import os
from pathlib import Path

from transcriptformer.config import DataConfig
from transcriptformer.data import cell_ranger, loom, soma
from transcriptformer.data.anndata_contents import contents_of_store
from transcriptformer.data.places import Contents
from transcriptformer.data.store import Location, Store, is_url
from transcriptformer.errors import DataError, UsageError

_READ_IN_R = {
    ".rds": "readRDS({file})",
    ".rdata": "get(load({file}))",
    ".rda": "get(load({file}))",
    ".h5seurat": "SeuratDisk::LoadH5Seurat({file})",
}
"""How R reads formats that only R can read."""

_USUAL_MODALITIES = ("rna", "RNA", "gex")


def open_contents(location: Location, config: DataConfig) -> Contents:
    """Open a file, folder or URL of any format.

    Parameters
    ----------
    config
        Which modality to read, and whether to follow links to other files.

    Raises
    ------
    UsageError
        If the location does not exist, or requires a package that is not installed.
    DataError
        If it is damaged, incomplete, or of another format.
    """
    if soma.is_soma(location):
        return soma.contents_of_experiment(location)
    if not is_url(location) and os.path.isdir(location):  # noqa: PTH112
        folder = Path(location)
        if (files := cell_ranger.find_files(folder)) is not None:
            return cell_ranger.contents_of_folder(folder, files, config.allow_external_links)
    elif not is_url(location):
        _refuse(Path(location))
    store = Store(location, config.allow_external_links)
    with store.reading():
        return _contents(store, config.modality)


def _refuse(path: Path) -> None:
    """Raise UsageError for files that are converted or given in another way."""
    name = path.name.lower()
    if not os.path.isfile(path):  # noqa: PTH113  (os.path returns False for invalid names, where Path raises)
        return
    if name.endswith((".mtx", ".mtx.gz")):
        raise UsageError(f"--data-file {path}: name the folder of the matrix instead, {path.parent}")
    if command := _READ_IN_R.get(path.suffix.lower()):
        read = command.format(file=f'"{path.name}"')
        raise UsageError(
            f"--data-file {path}: cannot be read without R; convert it to h5ad in R: x <- {read}; "
            f'anndataR::write_h5ad(x, "{path.stem}.h5ad")'
        )


def _contents(store: Store, modality: str) -> Contents:
    if "mod" in store:
        _enter_modality(store, modality)
    if "obs" in store and "var" in store:
        return contents_of_store(store)
    if not store.is_zarr:
        if all(group in store for group in loom.GROUPS):
            return loom.contents_of_loom(store)
        if (group := cell_ranger.find_group(store)) is not None:
            return cell_ranger.contents_of_h5(store, group)
    found = ", ".join(store.names_in("", ())[:8]) or "nothing"
    others = (
        "" if store.is_zarr else "; or a loom file, or a matrix of Cell Ranger such as filtered_feature_bc_matrix.h5"
    )
    raise DataError(
        f"{store.name}: not an AnnData (h5ad or zarr): requires 'obs' and 'var'{others}; it contains: {found}"
    )


def _enter_modality(store: Store, modality: str) -> None:
    if f"mod/{modality}" not in store:
        found = ", ".join(store.names_in("mod", _USUAL_MODALITIES)) or "none"
        raise DataError(
            f"{store.name}: has no modality {modality!r}; its modalities are: {found}; choose one with --modality"
        )
    store.enter(f"mod/{modality}")
