"""Local or remote stores of cells, HDF5 files or zarr stores, which every reading process opens for itself."""

import glob
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import zarr

from transcriptformer.data.temporary import TemporaryCopy, decompress, is_gzipped
from transcriptformer.errors import DataError, TranscriptFormerError, UsageError, one_line
from transcriptformer.storage.external import OPTION, Guard, check_folder, check_hdf5, check_structure, load_plugins

Location: TypeAlias = str | Path
"""Path, or URL such as s3://bucket/cells.zarr."""

_FRAMES = ("obs", "var")
"""Groups that every h5ad needs; an HDF5 file with damage in one is refused when it is opened."""

_COUNTS = ("X", "raw/X", "raw/var")
"""Groups that most h5ad files need; those with damage in one, and all other groups, are checked when they are read."""


def is_url(location: Location) -> bool:
    """Whether a location is a URL rather than a path."""
    return isinstance(location, str) and "://" in location


def is_zarr(location: Location) -> bool:
    """Whether a location is opened as a zarr store: any URL, any folder, and names in `.zarr` or `.zarr.zip`."""
    is_named = str(location).rstrip("/").endswith((".zarr", ".zarr.zip"))
    return is_named or is_url(location) or os.path.isdir(location)  # noqa: PTH112


def find_files(name: Location, option: str = "--data-file") -> list[str]:
    """Expand a path with wildcards into sorted paths; a path that exists, and a URL, stays as it is.

    Parameters
    ----------
    option
        Option that names the files, for messages.

    Raises
    ------
    UsageError
        If no file matches.
    """
    path = str(name)
    if is_url(name) or not glob.has_magic(path) or os.path.exists(path):  # noqa: PTH110
        return [path]
    found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
    if not found:
        raise UsageError(f"{option} {name}: no file matches")
    return found


def find_file(name: Location, option: str = "--data-file") -> str:
    """Return what `find_files` does, and raise UsageError unless it is one file."""
    found = find_files(name, option)
    if len(found) > 1:
        raise UsageError(f"{option} {name}: matches {len(found)} files; give one")
    return found[0]


class Store:
    """Read-only hierarchy of arrays on disk or behind a URL, opened on first access.

    Can be pickled and forked, because processes do not share file handles.

    Parameters
    ----------
    location
        Path or URL; HDF5 files may be gzipped.
    allow_external
        Follow links to other files, virtual datasets, and URLs that lead to other URLs.

    Raises
    ------
    UsageError
        If the location does not exist.
    DataError
        If it is neither an HDF5 file nor a zarr store, or damaged.
    """

    def __init__(self, location: Location, allow_external: bool = False) -> None:
        self.location = location if is_url(location) else Path(location)
        self.name, self.allow_external = str(location), allow_external
        self.group = ""
        self._root: h5py.File | zarr.Group | None = None
        self._process = -1
        self._checked: set[str] = set()
        self._copy: TemporaryCopy | None = None
        self._is_gzipped = self._uses_plugins = False
        self._check_location()

    def _check_location(self) -> None:
        if is_url(self.location):
            is_chain = "::" in self.name or self.name.startswith("reference:")
            if is_chain and not self.allow_external:
                raise UsageError(f"--data-file {self.name}: refers to other files; add {OPTION} to follow it")
        elif not is_zarr(self.location):
            self._check_file(Path(self.location))
        elif os.path.isdir(self.location):  # noqa: PTH112
            check_folder(Path(self.location), self.allow_external)

    def _check_file(self, path: Path) -> None:
        if not os.path.isfile(path):  # noqa: PTH113  (os.path returns False for invalid names, where Path raises)
            raise UsageError(f"--data-file {path}: no such file")
        with self.reading():
            self._is_gzipped = is_gzipped(path)
            if not self._is_gzipped and not h5py.is_hdf5(path):
                raise DataError(f"{path}: not an HDF5 file; expected an h5ad file, as written by adata.write_h5ad")
            try:  # in one look, because each takes a fork
                self._check_structure(*_FRAMES, *_COUNTS)
            except Exception:  # raised again by the next look, or when the counts are read, if they are
                self._check_structure(*_FRAMES)
        self._uses_plugins = "hdf5plugin" in sys.modules

    def _check_structure(self, *keys: str) -> None:
        check_structure(self.path, keys, self.allow_external, self.name)
        self._checked.update(keys)

    @property
    def path(self) -> Path:
        """The HDF5 file, or its decompressed copy."""
        if not self._is_gzipped:
            return Path(self.location)
        if self._copy is None or not self._copy.path.exists():
            self._copy = decompress(Path(self.location))
        return self._copy.path

    @property
    def is_zarr(self) -> bool:
        """Whether this is a zarr store rather than an HDF5 file."""
        return is_zarr(self.location)

    def enter(self, group: str) -> None:
        """Make all keys relative to a group."""
        self.group = group

    def _full(self, key: str) -> str:
        return f"{self.group}/{key}".strip("/")

    def check(self, *keys: str) -> None:
        """Check everything below `keys`, once; "" stands for the whole file.

        Raises
        ------
        DataError
            If something is missing, damaged, or stored in another file that may not be read.
        """
        full = {self._full(key) for key in keys}
        if is_zarr(self.location) or self._checked.issuperset(full):
            return
        with self.reading():
            check_hdf5(self.path, sorted(full), self.allow_external, self.name)
        self._uses_plugins = "hdf5plugin" in sys.modules
        self._checked.update(full)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Translate any error in reading damaged data to DataError."""
        try:
            yield
        except TranscriptFormerError:
            raise
        except Exception as error:  # on damaged data, h5py and zarr may raise anything
            raise unreadable(self.name, error) from error

    @property
    def root(self) -> h5py.File | zarr.Group:
        """Root of the hierarchy, opened once per process."""
        if self._root is None or self._process != os.getpid():
            self._root = _open_zarr(self.location) if is_zarr(self.location) else self._open_hdf5()
            self._process = os.getpid()
        return self._root

    def _open_hdf5(self) -> h5py.File:
        if self._uses_plugins:
            load_plugins()
        try:
            return h5py.File(self.path, locking="best-effort")
        except OSError as error:
            raise unreadable(self.name, error) from error

    def __contains__(self, key: str) -> bool:
        root = self.root
        with self.reading():
            if isinstance(root, h5py.File):
                return Guard(self.name, self.allow_external).contains(root, self._full(key))
            return self._full(key) in root

    def __getitem__(self, key: str) -> Any:
        root = self.root
        self.check(key)
        with self.reading():
            return root[self._full(key)]

    def names_in(self, key: str, usual: Sequence[str]) -> list[str]:
        """List the names in a group; of a store that cannot list, those of the usual ones that exist."""
        if key and key not in self:
            return []
        root, full = self.root, self._full(key)
        with self.reading():
            if isinstance(root, h5py.File):
                return list(map(str, Guard(self.name, self.allow_external).open(root, full)))
            with suppress(Exception) if is_url(self.location) else nullcontext():  # web servers may refuse to list
                group: Any = root[full] if full else root
                if names := list(map(str, group)):
                    return names
        return [name for name in usual if f"{key}/{name}" in self]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_root": None}

    def close(self) -> None:
        """Close the file and delete its decompressed copy; the next access reopens it."""
        if isinstance(self._root, h5py.File):
            self._root.close()
        elif self._root is not None and str(self.location).endswith(".zip"):
            self._root.store.close()
        self._root = self._copy = None


def attribute(element: Any, name: str, default: Any = "") -> Any:
    """Return an attribute of an element; text may be stored as bytes, as writers in other languages do."""
    value = element.attrs.get(name, default)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray) and value.dtype.kind in "SO":
        return [item.decode() if isinstance(item, bytes) else str(item) for item in value]
    return value


def _open_zarr(location: Location) -> zarr.Group:
    if not is_url(location) and not os.path.exists(location):  # noqa: PTH110
        raise UsageError(f"--data-file {location}: no such file or folder")
    if not is_url(location) and os.path.isfile(location):  # noqa: PTH113
        return _open_zipped(Path(location))
    try:
        return zarr.open_group(str(location), mode="r")
    except ImportError as error:
        raise UsageError(
            f"--data-file {location}: requires a package that is not installed ({one_line(error)}); "
            'for s3:// and https://, run: pip install "transcriptformer[remote]"'
        ) from error
    except Exception as error:  # zarr and its remote stores may raise anything
        if is_url(location):
            raise UsageError(
                f"--data-file {location}: cannot be read as a zarr store ({one_line(error)}); only zarr stores can be "
                "read from URLs, so download h5ad files first"
            ) from error
        raise UsageError(
            f"--data-file {location}: is a folder, but not a zarr store, a Cell Ranger folder (with matrix.mtx, "
            "features.tsv or genes.tsv, and barcodes.tsv) or a TileDB-SOMA experiment"
        ) from error


def _open_zipped(path: Path) -> zarr.Group:
    """Open a zarr store in a zip file, where it may be in a folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        folders = {name.partition("/")[0] for name in names}
        inside = folders.pop() if len(folders) == 1 else ""
        return zarr.open_group(zarr.storage.ZipStore(path, mode="r"), path=inside, mode="r")
    except Exception as error:  # zipfile and zarr may raise anything
        raise DataError(
            f"{path}: cannot be read as a zipped zarr store: truncated, damaged or of other content ({one_line(error)})"
        ) from error


def unreadable(name: str, error: Exception) -> DataError:
    """Return the error for an input whose reading failed with `error`."""
    if isinstance(error, MemoryError):
        cause = "not enough memory (lower model.data_config.block_size), or damaged and of a wrong size"
    elif is_url(name):
        cause = "the connection failed, or the store is incomplete, damaged or written by a newer anndata"
    else:
        cause = "truncated or damaged, open in another program, or written by a newer anndata"
    return DataError(f"{name}: cannot be read: {cause} ({one_line(error)})")
