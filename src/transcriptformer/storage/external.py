"""References from an input to other files: refused unless allowed, and an error if the target is missing.

HDF5 follows external links, external raw storage and virtual datasets to any readable file, and zarr follows symbolic
links. An untrusted input could thus copy the user's other files into the result, and HDF5 reads missing data as zeros.
"""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import h5py

from transcriptformer.errors import DataError, one_line
from transcriptformer.runtime.isolated import CrashedError, run_isolated
from transcriptformer.storage.file_state import FileState

OPTION = "--allow-external-links (model.data_config.allow_external_links)"

MAX_SOFT_LINKS = 16
"""Maximum depth of links to links, as in HDF5."""

CHUNK_STRINGS = 65_536

Steps: TypeAlias = Callable[["Guard", h5py.File, Sequence[str]], Generator[None]]
"""A check of some keys of a file."""

_passed: set[tuple[Steps, Path, FileState, tuple[str, ...]]] = set()
"""What was found intact, and free of references to other files, by this process."""


class MissingFilterError(DataError):
    """Dataset compressed by a filter that is not installed."""


def check_hdf5(path: Path, keys: Sequence[str], allow_external: bool, name: str | None = None) -> None:
    """Check every link, attribute and string under `keys` of an HDF5 file, in a child process that may crash.

    Missing keys are skipped. The package hdf5plugin is imported if the data is compressed by one of its filters.
    A file that has passed is not looked at again while it stays as it is.

    Parameters
    ----------
    name
        Name of the file in messages; None: its path.

    Raises
    ------
    DataError
        If data is in another file that is not allowed or missing, if a link is broken, or if damage makes HDF5 crash
        or hang.
    MissingFilterError
        If hdf5plugin is required, but not installed.
    RuntimeError
        If the file is damaged otherwise.
    """
    _check(Guard.steps_of_keys, path, keys, allow_external, name)


def check_structure(path: Path, keys: Sequence[str], allow_external: bool, name: str | None = None) -> None:
    """Open every object of an HDF5 file, in a child process that may crash, then check `keys` as `check_hdf5` does.

    Objects outside `keys` are opened, but not read, and their links are not followed. Damage there suggests damage in
    the numbers, which is undetectable.

    Raises
    ------
    DataError, RuntimeError
        See `check_hdf5`.
    """
    _check(_steps_of_structure, path, keys, allow_external, name)


def _check(steps: Steps, path: Path, keys: Sequence[str], allow_external: bool, name: str | None) -> None:
    name = name or str(path)
    look = steps, path, FileState.of(path), tuple(keys)
    if look in _passed:
        return

    def steps_of_file() -> Generator[None]:
        with h5py.File(path, locking="best-effort") as file:
            yield from steps(Guard(name, allow_external), file, keys)

    try:
        try:
            run_isolated(steps_of_file)
        except MissingFilterError:
            if not load_plugins():
                raise
            run_isolated(steps_of_file)
    except CrashedError as error:
        raise DataError(f"{name}: damaged: {error}; write the file again") from error
    if not allow_external:  # other files may change while this one stays as it is
        _passed.add(look)


def load_plugins() -> bool:
    """Make the filters of hdf5plugin available to HDF5; return whether it is installed."""
    return find_spec("hdf5plugin") is not None and import_module("hdf5plugin") is not None


def _steps_of_structure(guard: "Guard", file: h5py.File, keys: Sequence[str]) -> Generator[None]:
    yield from _open_all(file)
    yield from guard.steps_of_keys(file, keys)


def _open_all(file: h5py.File) -> Generator[None]:
    waiting, seen = [file["/"]], set[int]()
    while waiting:
        group = waiting.pop()
        for name in group:
            if isinstance(group.get(name, getlink=True), h5py.HardLink):
                element = group[name]
                address = h5py.h5o.get_info(element.id).addr
                if isinstance(element, h5py.Group) and address not in seen:
                    waiting.append(element)
                seen.add(address)
            yield


class Guard:
    """Open elements of an HDF5 file link by link, refusing links to other files unless allowed.

    Parameters
    ----------
    name
        Name of the file, for messages.
    allow_external
        Follow links to other files.
    """

    def __init__(self, name: str, allow_external: bool) -> None:
        self.name, self.allow_external = name, allow_external
        self.seen: set[tuple[str, int]] = set()

    def contains(self, group: h5py.Group, path: str) -> bool:
        """Whether `path` exists; raises DataError on a link to another file that is not allowed."""
        head, _, rest = path.strip("/").partition("/")
        if not head:
            return True
        if not group.id.links.exists(head.encode()):
            return False
        below = self.open(group, head)
        return not rest or (isinstance(below, h5py.Group) and self.contains(below, rest))

    def open(self, group: h5py.Group, path: str) -> Any:
        """Return the element at `path`.

        Raises
        ------
        DataError
            If a link on the way is broken, or leads to another file and that is not allowed.
        """
        try:
            return self._follow(group, path, MAX_SOFT_LINKS)
        except (KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
            place = f"{group.name.rstrip('/')}/{path.lstrip('/')}"
            raise DataError(f"{self.name}: damaged: {place} cannot be opened ({one_line(error)})") from error

    def _follow(self, group: h5py.Group, path: str, max_links: int) -> Any:
        element = group.file["/"] if path.startswith("/") else group
        for part in path.split("/"):
            if part in ("", "."):
                continue
            link = element.get(part, getlink=True)
            if isinstance(link, h5py.SoftLink):
                if max_links == 0:
                    raise KeyError("circular links")
                element = self._follow(element, link.path, max_links - 1)
                continue
            if isinstance(link, h5py.ExternalLink):
                self._refuse(f"{element.name.rstrip('/')}/{part}", "an external link to", link.filename)
            element = element[part]
        return element

    def steps_of_keys(self, file: h5py.File, keys: Sequence[str]) -> Generator[None]:
        """Check everything under the keys that exist."""
        for key in keys:
            if self.contains(file, key):
                yield from self.steps(self.open(file, key), key)

    def steps(self, element: Any, place: str) -> Generator[None]:
        """Check an element and everything below it, in small steps."""
        waiting = [(element, place)]
        with ExitStack() as files:
            while waiting:
                element, place = waiting.pop()
                if not isinstance(element, h5py.Group | h5py.Dataset) or self._was_seen(element):
                    continue
                for name in element.attrs:
                    with suppress(Exception):  # unreadable attributes are reported where they are used
                        value = element.attrs[name]
                        if isinstance(value, h5py.Reference) and value:  # old files refer to categories this way
                            waiting.append((element.file[value], f"{place}@{name}"))
                    yield
                if isinstance(element, h5py.Group):
                    waiting += [(self.open(element, name), f"{place}/{name}") for name in element]
                    yield
                    continue
                waiting += self._sources(element, place, files)
                self._check_filters(element, place)
                with suppress(Exception):
                    yield from _read_strings(element)

    def check(self, dataset: h5py.Dataset, place: str) -> None:
        """Check where the data of a dataset is stored, without reading it."""
        with ExitStack() as files:
            for source, of_source in self._sources(dataset, place, files):
                self.check(source, of_source)

    def _was_seen(self, element: Any) -> bool:
        key = element.file.filename, h5py.h5o.get_info(element.id).addr
        known = key in self.seen
        self.seen.add(key)
        return known

    def _check_filters(self, dataset: h5py.Dataset, place: str) -> None:
        settings = dataset.id.get_create_plist()
        for number in range(settings.get_nfilters()):
            code, _, _, label = settings.get_filter(number)
            if not h5py.h5z.filter_avail(code):
                described = label.decode(errors="replace").partition(";")[0] or "unknown"
                raise MissingFilterError(
                    f"{self.name}: {place} is compressed by a filter that is not installed ({described}, {code}); run: "
                    "pip install hdf5plugin"
                )

    def _sources(self, dataset: h5py.Dataset, place: str, files: ExitStack) -> list[tuple[h5py.Dataset, str]]:
        """Return the source datasets of a dataset, after checking that its data is complete."""
        if not isinstance(dataset, h5py.Dataset):
            raise DataError(f"{self.name}: damaged: {place} is not a dataset")
        needed = dataset.size * dataset.dtype.itemsize if dataset.size else 0
        for file_name, offset, size in dataset.external or ():
            self._refuse(place, "stored in", file_name)
            wanted = min(size, needed)
            needed -= wanted
            if not os.path.isfile(file_name) or os.path.getsize(file_name) < offset + wanted:  # noqa: PTH113, PTH202
                raise self._missing(place, file_name)
        if not dataset.is_virtual:
            return []
        sources, mappings = [], dataset.virtual_sources()
        for mapping in mappings:
            source = self._open_source(dataset, mapping, place, files)
            sources.append((source, f"{place} → {mapping.file_name}:{mapping.dset_name}"))
        if dataset.size and not _are_complete(dataset, mappings):
            raise DataError(f"{self.name}: {place} is a virtual dataset with missing sources")
        return sources

    def _open_source(self, dataset: h5py.Dataset, mapping: Any, place: str, files: ExitStack) -> h5py.Dataset:
        file = dataset.file
        if mapping.file_name != ".":
            self._refuse(place, "a virtual dataset of", mapping.file_name)
            beside = Path(file.filename).parent / mapping.file_name
            path = next((p for p in (beside, Path(mapping.file_name)) if p.is_file()), None)
            if path is None:
                raise self._missing(place, mapping.file_name)
            file = files.enter_context(h5py.File(path, locking="best-effort"))
        source = self.open(file["/"], mapping.dset_name)
        if not isinstance(source, h5py.Dataset) or not _covers(source, mapping):
            raise self._missing(place, f"{mapping.file_name}:{mapping.dset_name}")
        return source

    def _refuse(self, place: str, kind: str, target: str) -> None:
        if not self.allow_external:
            raise DataError(f"{self.name}: {place} is {kind} another file, {target!r}; to follow it, add {OPTION}")

    def _missing(self, place: str, target: str) -> DataError:
        return DataError(f"{self.name}: {place} is in another file, {target!r}, which is missing or too short")


def _covers(source: h5py.Dataset, mapping: Any) -> bool:
    """Whether a source dataset is large enough for a mapping."""
    if mapping.src_space.get_select_type() == h5py.h5s.SEL_ALL:
        return prod(source.shape) >= mapping.vspace.get_select_npoints()
    try:
        _, last = mapping.src_space.get_select_bounds()
    except ValueError:  # unlimited selection
        return False
    return len(last) == source.ndim and all(end < size for end, size in zip(last, source.shape, strict=True))


def _are_complete(dataset: h5py.Dataset, mappings: Sequence[Any]) -> bool:
    """Whether the mappings, which may overlap, cover all of a virtual dataset."""
    left = dataset.id.get_space()
    for mapping in mappings:
        for start, stride, count, block in _hyperslabs(mapping.vspace):
            left.select_hyperslab(start, count, stride, block, op=h5py.h5s.SELECT_NOTB)
    return left.get_select_npoints() == 0


def _hyperslabs(space: Any) -> list[tuple[Sequence[int], ...]]:
    """Return (start, stride, count, block) of each selected hyperslab; none for an unlimited selection."""
    ones = (1,) * len(space.shape)
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return [((0,) * len(ones), ones, ones, space.shape)]
    if space.get_select_type() != h5py.h5s.SEL_HYPERSLABS:
        return []
    if not space.is_regular_hyperslab():
        blocks = space.get_select_hyper_blocklist()
        return [(tuple(first), ones, ones, tuple(last - first + 1)) for first, last in blocks]
    slab = space.get_regular_hyperslab()
    return [] if any(h5py.h5s.UNLIMITED in numbers for numbers in slab) else [slab]


def _read_strings(dataset: h5py.Dataset) -> Generator[None]:
    """Read all strings, since HDF5 may hang on damaged heaps, or the first and last value of other types."""
    if dataset.ndim == 0 or dataset.size == 0:
        dataset[()]
    elif not dataset.dtype.hasobject:
        dataset[0], dataset[-1]
    else:
        for start in range(0, len(dataset), CHUNK_STRINGS):
            dataset[start : start + CHUNK_STRINGS]
            yield
    yield


def check_folder(path: Path, allow_external: bool) -> None:
    """Check the symbolic links below a folder.

    Raises
    ------
    DataError
        If one is broken, or leads out of the folder and that is not allowed.
    """
    root, seen = os.path.realpath(path), set[str]()
    for folder, folders, files in os.walk(root, followlinks=allow_external):
        if os.path.realpath(folder) in seen:  # reached by another link, or a cycle
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        for place in (os.path.join(folder, name) for name in (*folders, *files)):  # noqa: PTH118
            if not os.path.islink(place):  # noqa: PTH114
                continue
            target, shown = os.path.realpath(place), os.path.relpath(place, root)
            if not os.path.exists(target):  # noqa: PTH110
                raise DataError(f"{path}: {shown} is a link to {target!r}, which is missing")
            if not allow_external and os.path.commonpath([root, target]) != root:
                raise DataError(
                    f"{path}: {shown} is a link out of the store, to {target!r}; to follow it, add {OPTION}"
                )
