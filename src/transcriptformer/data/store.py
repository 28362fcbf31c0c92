"""Where an AnnData lies: an h5ad file, or a zarr store, maybe far away; opened anew by every process that reads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import zarr

from transcriptformer.errors import DataError, TranscriptFormerError, UsageError, one_line
from transcriptformer.storage.external import OPTION, Guard, check_folder, check_hdf5, check_structure

Location: TypeAlias = str | Path
"""A path, or a URL such as s3://bucket/cells.zarr."""

_NEEDED = ("obs", "var")


def is_url(location: Location) -> bool:
    """Whether a location is a URL rather than a path."""
    return isinstance(location, str) and "://" in location


def is_zarr(location: Location) -> bool:
    """Whether a location is to be opened as a zarr store: every URL, every folder, and what is named so."""
    return is_url(location) or os.path.isdir(location) or str(location).rstrip("/").endswith(".zarr")  # noqa: PTH112


class Store:
    """An AnnData on disk or behind a URL, opened for reading when it is first looked into.

    It may be sent to another process, and survives a fork: handles are never shared.

    Parameters
    ----------
    location
        Where it lies.
    allow_external
        Follow links to other files, virtual datasets, and URLs that lead to other URLs.

    Raises
    ------
    UsageError
        If there is nothing at the location.
    DataError
        If it is not an AnnData, or damaged.
    """

    def __init__(self, location: Location, allow_external: bool = False) -> None:
        self.location = location if is_url(location) else Path(location)
        self.name, self.allow_external = str(location), allow_external
        self._root: h5py.File | zarr.Group | None = None
        self._process = -1
        self._checked: set[str] = set()
        self._check_place()
        if not all(key in self for key in _NEEDED):  # a web server may not tell what there is
            raise DataError(f"{self.name}: not an AnnData (h5ad or zarr): 'obs' and 'var' are not in it")

    def _check_place(self) -> None:
        if is_url(self.location):
            is_chain = "::" in self.name or self.name.startswith("reference:")
            if is_chain and not self.allow_external:
                raise UsageError(f"--data-file {self.name}: leads on to other files; to follow it, add {OPTION}")
        elif not is_zarr(self.location):
            _check_h5ad(Path(self.location))
            with self.reading():
                check_structure(Path(self.location), _NEEDED, self.allow_external)
            self._checked.update(_NEEDED)
        elif os.path.isdir(self.location):  # noqa: PTH112
            check_folder(Path(self.location), self.allow_external)

    def check(self, *keys: str) -> None:
        """Look, once, at all that lies under `keys`; "" stands for everything.

        Raises
        ------
        DataError
            If something there lies in another file, is missing or damaged.
        """
        if is_zarr(self.location) or self._checked.issuperset(keys):
            return
        with self.reading():
            check_hdf5(Path(self.location), keys, self.allow_external)
        self._checked.update(keys)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raise what reading a damaged file leads to as DataError."""
        try:
            yield
        except TranscriptFormerError:
            raise
        except Exception as error:  # h5py and zarr raise whatever damaged data leads them to
            raise damaged(self.name, error) from error

    @property
    def root(self) -> h5py.File | zarr.Group:
        """The top of the hierarchy."""
        if self._root is None or self._process != os.getpid():
            self._root = _open_zarr(self.location) if is_zarr(self.location) else _open_h5ad(Path(self.location))
            self._process = os.getpid()
        return self._root

    def __contains__(self, key: str) -> bool:
        root = self.root
        with self.reading():
            if isinstance(root, h5py.File):
                return Guard(self.name, self.allow_external).contains(root, key)
            return key in root

    def __getitem__(self, key: str) -> Any:
        root = self.root
        self.check(key)
        with self.reading():
            return root[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_root": None}

    def close(self) -> None:
        """Let go of the file."""
        if isinstance(self._root, h5py.File):
            self._root.close()
        self._root = None


def _check_h5ad(path: Path) -> None:
    if not os.path.isfile(path):  # noqa: PTH113  (os.path answers False for an impossible name, where Path raises)
        raise UsageError(f"--data-file {path}: no such file")
    if not h5py.is_hdf5(path):
        raise DataError(f"{path}: not an HDF5 file; an h5ad is needed (anndata's write_h5ad makes one)")


def _open_h5ad(path: Path) -> h5py.File:
    try:
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
