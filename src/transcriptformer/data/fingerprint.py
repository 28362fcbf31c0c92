"""Fingerprints of inputs: content hashes that are cheap for files and stores of any size.

Inputs up to `FULL_HASH_BYTES` are hashed completely. For larger ones, the fingerprint covers the size, the hierarchy
with all attributes, indexes and row pointers, the stored size of every compressed chunk, and evenly spaced blocks of
every array. In-place changes of a few values between these blocks are not detected.
"""

import hashlib
import logging
import math
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import zarr

from transcriptformer.data.store import Location, Store, is_url, unreadable
from transcriptformer.errors import UsageError
from transcriptformer.runtime.isolated import CrashedError, exhaust, run_isolated
from transcriptformer.storage.file_state import FileState

logger = logging.getLogger(__name__)

Hierarchy: TypeAlias = h5py.File | zarr.Group

FULL_HASH_BYTES = 2**26
"""Files and stores up to this size are hashed completely, as are indexes and row pointers in larger ones."""

SMALL_ARRAY_BYTES = 2**20
"""Arrays up to this size are hashed completely."""

BLOCK_BYTES = 2**16
"""Size of a sampled block."""

N_BLOCKS, N_REMOTE_BLOCKS = 128, 8
"""Sampled blocks per array or file, and per remote array, where each costs a request."""

SECONDS_PER_STEP = 5
"""CPU time limit for hashing a block or listing the objects of a file."""

MAX_CHUNKS = 2**20
"""Chunk sizes are not listed for HDF5 arrays with more chunks."""

_CONTENT_HASHES = ("ETag", "md5Hash")
"""Keys of content hashes in S3 and Google Cloud Storage listings."""

_UNLISTED = (
    *("obs", "var", "X", "raw", "layers", "obsm", "varm", "uns"),
    *("data", "indices", "indptr", "codes", "categories", "values", "mask"),
)
"""Keys that an AnnData may have; web servers cannot list them."""


def fingerprint(location: Location) -> str:
    """Hash the content of a file or store, independent of its path and modification time.

    Parameters
    ----------
    location
        File, folder or URL of a zarr store.

    Returns
    -------
    Hexadecimal digest. Equal bytes have equal fingerprints, but those of a remote store and its local copy differ.

    Raises
    ------
    DataError
        If the location cannot be read.
    UsageError
        If it does not exist.
    """
    if is_url(location):
        return _of_url(str(location))
    if not os.path.exists(location):  # noqa: PTH110  (returns False for invalid names, where Path raises)
        raise UsageError(f"--data-file {location}: no such file or folder")
    path = Path(location)
    try:
        return _of_folder(path) if path.is_dir() else _of_file(path)
    except (OSError, MemoryError) as error:
        raise unreadable(str(path), error) from error


def identify(location: Location) -> dict[str, str]:
    """Return the properties that identify an input: its content, under any name."""
    return {"content": fingerprint(location)}


def identify_file(path: Path) -> dict[str, str]:
    """Return the properties that identify a file of any format."""
    return {"content": fingerprint_file(path)}


def fingerprint_file(path: Path) -> str:
    """Hash a file of any format: all bytes up to `FULL_HASH_BYTES`, else its size and evenly spaced blocks."""
    digest = _Digest()
    size = path.stat().st_size
    digest.add(size)
    with path.open("rb") as file:
        if size <= FULL_HASH_BYTES:
            digest.add(hashlib.file_digest(file, "sha256").digest())
        else:
            for start in _starts(size, BLOCK_BYTES, N_BLOCKS):
                file.seek(start)
                digest.add(file.read(BLOCK_BYTES))
    return digest.hexdigest()


class _Digest:
    """SHA-256 of a sequence of length-prefixed values."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def add(self, *values: object) -> None:
        for value in values:
            data = value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass")
            self.sha256.update(len(data).to_bytes(8, "little"))
            self.sha256.update(data)

    def hexdigest(self) -> str:
        return self.sha256.hexdigest()


def _of_file(path: Path) -> str:
    size = path.stat().st_size
    if not h5py.is_hdf5(path):
        return fingerprint_file(path)
    digest = _Digest()
    digest.add(size)
    try:
        digest.add(*map(fingerprint_file, _linked_files(path)))
        if size > FULL_HASH_BYTES:
            return run_isolated(partial(_sampled, path, digest), SECONDS_PER_STEP)
    except (CrashedError, RuntimeError) as error:  # damaged, which the run may not notice if it reads other parts
        logger.warning("%s: parts of the file are damaged (%s)", path, error)
        digest = _Digest()
        digest.add(size, "damaged")
    digest.add(fingerprint_file(path))
    return digest.hexdigest()


def _sampled(path: Path, digest: _Digest) -> Generator[None, None, str]:
    with h5py.File(path, locking="best-effort") as file:
        yield from _add_hierarchy(digest, file, N_BLOCKS)
    return digest.hexdigest()


def _of_folder(folder: Path) -> str:
    """Hash names and sizes of all files, and the content of the zarr store or of the other files."""
    files, repeats = _files_below(folder)
    sizes = [path.stat().st_size for path in files]
    digest = _Digest()
    for path, size in zip(files, sizes, strict=True):
        digest.add(path.relative_to(folder).as_posix(), size)
    digest.add(*repeats)
    root = None if sum(sizes) <= FULL_HASH_BYTES else _open_zarr(folder)
    if root is not None:
        exhaust(_add_hierarchy(digest, root, N_BLOCKS))
    else:
        digest.add(*map(fingerprint_file, files))
    return digest.hexdigest()


def _files_below(folder: Path) -> tuple[list[Path], list[str]]:
    """List all files, following links but visiting each folder once, and the paths that lead to a visited folder."""
    files: list[Path] = []
    repeats: list[str] = []
    first: dict[str, Path] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        path = Path(place)
        before = first.setdefault(os.path.realpath(path), path)
        if before != path:  # possibly a parent folder
            repeats.append(f"{path.relative_to(folder).as_posix()} → {before.relative_to(folder).as_posix()}")
            folders.clear()
            continue
        folders.sort()  # for the same order in every copy
        files += [path / name for name in names if (path / name).is_file()]
    return sorted(files), repeats


def _open_zarr(folder: Path) -> zarr.Group | None:
    try:
        return zarr.open_group(str(folder), mode="r")
    except Exception:  # on other folders, zarr may raise anything
        return None


def _of_url(url: str) -> str:
    digest = _Digest()
    listing = _list_hashes(url)
    if listing:
        digest.add(*listing)
        return digest.hexdigest()
    root = Store(url, allow_external=True).root  # checked when the input was opened
    try:
        exhaust(_add_hierarchy(digest, root, N_REMOTE_BLOCKS))
    except Exception as error:  # zarr and its remote stores may raise anything
        raise unreadable(url, error) from error
    return digest.hexdigest()


def _list_hashes(url: str) -> list[str]:
    """List name, size and content hash of every object below `url`; empty if the store does not provide them."""
    if url.startswith(("http://", "https://")):
        return []
    try:
        import fsspec  # installed with the extra `remote`

        files, folder = fsspec.core.url_to_fs(url)
        files.invalidate_cache()
        found = files.find(folder, detail=True)
    except Exception:  # fsspec's file systems may raise anything
        return []
    lines = []
    for name, info in sorted(found.items()):
        hashes = [str(info[key]) for key in _CONTENT_HASHES if info.get(key)]
        if not hashes:
            return []
        lines.append(f"{name.removeprefix(folder)} {info.get('size')} {hashes[0]}")
    return lines


def _add_hierarchy(digest: _Digest, root: Hierarchy, n_blocks: int) -> Generator[None]:
    """Add names, attributes, shapes and dtypes of all objects, and blocks of all arrays, one per step."""
    objects = list(_objects(root))
    _add_attributes(digest, root)
    if isinstance(root, h5py.File):
        soft_links: list[str] = []
        root.visititems_links(
            lambda name, link: soft_links.append(f"{name} → {link.path}") if isinstance(link, h5py.SoftLink) else None
        )
        digest.add(*soft_links)
    frames = {path: _text(element.attrs.get("_index")) for path, element in objects if not hasattr(element, "shape")}
    is_small = sum(_n_bytes(element) for _, element in objects if hasattr(element, "shape")) <= FULL_HASH_BYTES
    for path, element in objects:
        digest.add(path)
        _add_attributes(digest, element)
        if hasattr(element, "shape"):
            digest.add(element.shape, element.dtype)
            parent, _, name = path.rpartition("/")
            is_index = name == "indptr" or name == frames.get(parent)
            whole = is_small or _n_bytes(element) <= (FULL_HASH_BYTES if is_index else SMALL_ARRAY_BYTES)
            yield from _add_array(digest, element, whole, n_blocks)
        yield


def _objects(root: Hierarchy) -> Iterator[tuple[str, Any]]:
    """Yield groups and arrays below `root` with their paths, sorted by path; external links are not followed."""
    if isinstance(root, h5py.File):
        found: list[tuple[str, Any]] = []
        root.visititems(lambda name, element: found.append((name, element)))
        yield from found
        return
    members = sorted(root.members(max_depth=None)) if root.metadata.consolidated_metadata else []
    yield from members or _unlisted_members(root, "")


def _unlisted_members(group: zarr.Group, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the groups and arrays of a store without consolidated metadata: the listed ones and known AnnData keys."""
    index, columns = group.attrs.get("_index"), group.attrs.get("column-order")
    names = {*_UNLISTED, *(columns if isinstance(columns, list) else ()), *((index,) if index else ())}
    with suppress(Exception):  # remote file systems may raise anything
        names |= set(group.keys())
    for name in sorted(map(str, names)):
        if name in group:
            element = group[name]
            yield f"{path}{name}", element
            if isinstance(element, zarr.Group):
                yield from _unlisted_members(element, f"{path}{name}/")


def _add_attributes(digest: _Digest, element: Any) -> None:
    for name in sorted(element.attrs):
        try:
            digest.add(name, _text(element.attrs[name]))
        except (OSError, TypeError, ValueError):  # a type unknown to h5py
            digest.add("unreadable")


def _add_array(digest: _Digest, array: Any, whole: bool, n_blocks: int) -> Generator[None]:
    """Add a complete array, or its chunk sizes and evenly spaced blocks of rows, one block per step."""
    if array.shape is None or 0 in array.shape:
        return
    try:
        if array.ndim == 0:
            digest.add(_values(array[()]))
            return
        n_rows = array.shape[0]
        if whole:
            rows_per_read = max(1, SMALL_ARRAY_BYTES * n_rows // _n_bytes(array))
            starts: Iterable[int] = range(0, n_rows, rows_per_read)
        else:
            digest.add(*_chunk_sizes(array))
            rows_per_read = max(1, BLOCK_BYTES * n_rows // _n_bytes(array))
            starts = _starts(n_rows, rows_per_read, n_blocks)
        for start in starts:
            digest.add(_values(array[start : start + rows_per_read]))
            yield
    except (OSError, TypeError, ValueError, RuntimeError):  # such as a missing filter plugin
        digest.add("unreadable")


def _chunk_sizes(array: Any) -> Iterable[bytes]:
    """Return the chunk sizes of a compressed HDF5 array, which almost any change of values affects."""
    if not isinstance(array, h5py.Dataset) or array.chunks is None or not array.id.get_create_plist().get_nfilters():
        return ()
    n_chunks = math.prod(-(-n // chunk) for n, chunk in zip(array.shape, array.chunks, strict=True))
    if n_chunks > MAX_CHUNKS:
        return ()
    sizes: list[int] = []
    array.id.chunk_iter(lambda chunk: sizes.append(chunk.size))
    return (np.array(sizes, "<i8").tobytes(),)


def _starts(n: int, block: int, n_blocks: int) -> list[int]:
    """Return the unique starts of evenly spaced blocks, from 0 to `n - block`."""
    last = max(0, n - block)
    return sorted({last * i // max(1, n_blocks - 1) for i in range(n_blocks)})


def _values(values: Any) -> bytes:
    array = np.asarray(values)
    if array.dtype.hasobject or array.dtype.kind == "T":
        return repr(array.tolist()).encode(errors="surrogatepass")
    return array.tobytes()


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return repr(value.tolist()) if isinstance(value, np.ndarray | np.generic) else str(value)


def _n_bytes(array: Any) -> int:
    return 0 if array.shape is None else math.prod(array.shape) * max(1, array.dtype.itemsize)


def _linked_files(path: Path) -> Iterator[Path]:
    """Yield the existing files that an HDF5 file refers to, directly or through other HDF5 files."""
    waiting, seen = [path], {os.path.realpath(path)}
    while waiting:
        path = waiting.pop(0)
        for name in _external_file_names(path, FileState.of(path)):
            for place in (path.parent / name, Path(name)):  # where HDF5 looks for them
                if place.is_file() and os.path.realpath(place) not in seen:
                    seen.add(os.path.realpath(place))
                    yield place
                    if h5py.is_hdf5(place):
                        waiting.append(place)


@lru_cache(maxsize=1024)
def _external_file_names(path: Path, _: FileState) -> list[str]:
    """List the names of external files in an HDF5 file; empty if it cannot be read."""
    return run_isolated(partial(_find_external_files, path), SECONDS_PER_STEP)


def _find_external_files(path: Path) -> Generator[None, None, list[str]]:
    names: list[str] = []

    def visit_link(path: str, link: Any) -> None:
        if isinstance(link, h5py.ExternalLink):
            names.append(link.filename)

    def visit(path: str, element: Any) -> None:
        if isinstance(element, h5py.Dataset):
            names.extend(_text(name) for name, _, _ in element.external or ())
            names.extend(source.file_name for source in (element.virtual_sources() if element.is_virtual else ()))

    with suppress(Exception), h5py.File(path, locking="best-effort") as file:  # damage is reported by the run
        file.visititems_links(visit_link)
        yield
        file.visititems(visit)
    return [name for name in dict.fromkeys(names) if name != "."]
