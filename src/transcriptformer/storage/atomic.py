"""Files and folders that are whole or not there."""

import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from transcriptformer.errors import OutputError, UsageError, one_line

SYNCS_AT_ONCE = 32

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EISDIR)
"""Errors of file systems, and of Windows, that do not sync folders."""


_FAILING_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors that no other path or option would avoid."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise an OSError as OutputError: `path` cannot be written, and why.

    Raises
    ------
    OutputError
        In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or one_line(error)})") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file, then sync it and move it to `path`.

    An older file stays until then. Whoever writes must be alone in the folder (`transcriptformer.storage.lock`).

    Raises
    ------
    OutputError
        If it cannot be written; `path` stays as it was, unless nothing but the last sync failed.
    """
    temporary = temporary_path(path)
    try:
        with writing(path):
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        remove(temporary)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder, then sync all that is in it and move it to `path`.

    An older folder is set aside for the moment of the move. It is put back if that fails, or an exception of any kind
    comes in between, such as a signal's; after a kill, by the next attempt.

    Raises
    ------
    OutputError
        If it cannot be written; `path` stays as it was, unless nothing but the last sync failed.
    """
    temporary, older = temporary_path(path), older_path(path)
    with writing(path):
        tidy_folder(path)
        temporary.mkdir()
    try:
        with writing(path):
            yield temporary
            with ThreadPoolExecutor(SYNCS_AT_ONCE) as threads:  # a disk syncs many files as fast as one
                list(threads.map(sync, [path for path in temporary.rglob("*") if path.is_file()]))
                list(threads.map(sync_folder, [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]))
            if path.exists():
                path.rename(older)
            temporary.rename(path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # the older one stays aside, for the next attempt to put back
            tidy_folder(path)


def temporary_path(path: Path) -> Path:
    """Where `path` is written before it is whole."""
    return path.with_name(f".{path.name}.tmp")


def older_path(path: Path) -> Path:
    """Where an older folder is while it is replaced."""
    return path.with_name(f".{path.name}.old")


def tidy_folder(path: Path) -> None:
    """Clear away what is left of replacing a folder; OSError where the older one cannot be put back; it stays."""
    older = older_path(path)
    try:
        if older.exists() and not path.exists():  # the end came between the two moves
            older.rename(path)
    finally:
        remove(temporary_path(path))
    remove(older)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, and see that a loss of power does not undo it.

    Raises
    ------
    OSError
        If that is not possible.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file is safely on disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are safely on disk, on file systems that can tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or folder as far as possible; what stays is overwritten by the next attempt."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_writable(path: Path, option: str = "--output-path") -> None:
    """Make the folder of `path`, which an option names, and try to write there, so that a long run does not fail late.

    Raises
    ------
    UsageError
        If that is not possible.
    OutputError
        If the disk is full or broken, which is no mistake of the user's.
    """
    if path.is_dir() and path.suffix != ".zarr":
        raise UsageError(f"{path}: is a folder; the result needs another name")
    probe = path.with_name(f".{path.name}.probe")
    try:
        make_folder(path.parent)
        probe.touch()
    except OSError as error:
        kind = OutputError if error.errno in _FAILING_DISK else UsageError
        raise kind(f"{option} {path.parent}: {path.name} cannot be written there ({error.strerror})") from error
    finally:
        remove(probe)


def check_room(path: Path, n_bytes: int, advice: str = "") -> None:
    """Raise OutputError where the disk of `path` has no room for so many bytes; `advice` follows."""
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        raise OutputError(
            f"{path}: cannot be written: {n_bytes / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free{advice}"
        )
