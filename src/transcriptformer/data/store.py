"""Where an AnnData lies: an h5ad file, or a zarr store, maybe far away; opened anew by every process that reads."""

import os
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import zarr

from transcriptformer.errors import DataError, UsageError, one_line

Location: TypeAlias = str | Path
"""A path, or a URL such as s3://bucket/cells.zarr."""


def is_url(location: Location) -> bool:
    """Whether a location is a URL rather than a path."""
    return isinstance(location, str) and "://" in location


def is_zarr(location: Location) -> bool:
    """Whether a location is to be opened as a zarr store: every URL, every folder, and what is named so."""
    return is_url(location) or os.path.isdir(location) or str(location).rstrip("/").endswith(".zarr")  # noqa: PTH112


class Store:
    """An AnnData on disk or behind a URL, opened for reading when it is first looked into.

    It may be sent to another process, and survives a fork: handles are never shared.

    Raises
    ------
    UsageError
        If there is nothing at the location.
    DataError
        If it is not an AnnData, or damaged.
    """

    def __init__(self, location: Location) -> None:
        self.location = location if is_url(location) else Path(location)
        self.name = str(location)
        self._root: h5py.File | zarr.Group | None = None
        self._process = -1
        if not all(key in self.root for key in ("obs", "var")):  # a web server may not tell what there is
            raise DataError(f"{self.name}: not an AnnData (h5ad or zarr): 'obs' and 'var' are not in it")

    @property
    def root(self) -> h5py.File | zarr.Group:
        """The top of the hierarchy."""
        if self._root is None or self._process != os.getpid():
            self._root = _open_zarr(self.location) if is_zarr(self.location) else _open_h5ad(Path(self.location))
            self._process = os.getpid()
        return self._root

    def __contains__(self, key: str) -> bool:
        return key in self.root

    def __getitem__(self, key: str) -> Any:
        return self.root[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_root": None}

    def close(self) -> None:
        """Let go of the file."""
        if isinstance(self._root, h5py.File):
            self._root.close()
        self._root = None


def _open_h5ad(path: Path) -> h5py.File:
    if not os.path.isfile(path):  # noqa: PTH113  (os.path answers False for an impossible name, where Path raises)
        raise UsageError(f"--data-file {path}: no such file")
    try:
        if not h5py.is_hdf5(path):
            raise DataError(f"{path}: not an HDF5 file; an h5ad is needed (anndata's write_h5ad makes one)")
        return h5py.File(path, locking="best-effort")
    except OSError as error:
        raise damaged(str(path), error) from error


def _open_zarr(location: Location) -> zarr.Group:
    if not is_url(location) and not os.path.exists(location):  # noqa: PTH110
        raise UsageError(f"--data-file {location}: no such file or folder")
    try:
        return zarr.open_group(str(location), mode="r")
    except ImportError as error:
        raise UsageError(
            f"--data-file {location}: reading it needs a package that is not installed ({one_line(error)}); "
            'pip install "transcriptformer[remote]" brings those for s3:// and https://'
        ) from error
    except Exception as error:  # zarr and its stores raise whatever the other side answers
        if is_url(location):
            raise UsageError(
                f"--data-file {location}: no zarr store can be read there ({one_line(error)}); of files far away, "
                "zarr stores can be read; an h5ad has to be downloaded"
            ) from error
        raise UsageError(f"--data-file {location}: is a folder, not an h5ad file, and holds no zarr store") from error


def damaged(name: str, error: Exception) -> DataError:
    """What to say where reading fails."""
    return DataError(
        f"{name}: cannot be read: truncated or damaged, open in another program, or written by a newer anndata "
        f"({one_line(error)})"
    )
