"""Atomic writes of files and folders."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from transcriptformer.errors import OutputError, UsageError, one_line

SYNC_THREADS = 32

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EISDIR)
"""Errors of Windows and of file systems that cannot sync folders."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors of a full or broken disk, which are not the user's mistake."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Re-raise an OSError as an OutputError that names `path`.

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
    """Yield a temporary path, then sync the file written there and move it to `path`.

    An existing file stays until then. Concurrent writers must hold a lock (`transcriptformer.storage.lock`).

    Raises
    ------
    OutputError
        If writing fails; `path` is unchanged, unless only the final sync failed.
    """
    temporary = temporary_path(path)
    try:
        with writing(path):
            yield temporary
            move_file(temporary, path)
    finally:
        remove(temporary)


def move_file(source: Path, path: Path) -> None:
    """Sync a file, move it to `path` on the same file system, and sync that folder; OSError if one of these fails."""
    sync(source)
    source.replace(path)
    sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder, then sync its contents and move it to `path`.

    An existing folder is renamed to `backup_path` during the move. It is restored after any exception, including those
    raised by signals; after a kill, the next attempt restores it.

    Raises
    ------
    OutputError
        If writing fails; `path` is unchanged, unless only the final sync failed.
    """
    temporary, backup = temporary_path(path), backup_path(path)
    with writing(path):
        clean_up_folder(path)
        temporary.mkdir()
    try:
        with writing(path):
            yield temporary
            with ThreadPoolExecutor(SYNC_THREADS) as threads:  # parallel syncs take as long as one
                list(threads.map(sync, [path for path in temporary.rglob("*") if path.is_file()]))
                list(threads.map(sync_folder, [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]))
            if path.exists():
                path.rename(backup)
            temporary.rename(path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # the next attempt restores the backup
            clean_up_folder(path)


def temporary_path(path: Path) -> Path:
    """Path at which `path` is written before it is moved into place."""
    return path.with_name(f".{path.name}.tmp")


def backup_path(path: Path) -> Path:
    """Path of an existing folder while it is being replaced."""
    return path.with_name(f".{path.name}.old")


def clean_up_folder(path: Path) -> None:
    """Clean up after an interrupted replacement of a folder, and restore its backup if needed.

    Raises
    ------
    OSError
        If the backup cannot be restored; it is kept.
    """
    backup = backup_path(path)
    try:
        if backup.exists() and not path.exists():  # interrupted between the two moves
            backup.rename(path)
    finally:
        remove(temporary_path(path))
    remove(backup)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents durably.

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
    """Sync a file to disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Sync the entries of a folder to disk, on file systems that support it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or folder, ignoring errors; the next attempt overwrites leftovers."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_writable(path: Path, option: str = "--output-path") -> None:
    """Create the folder of `path` and try to write there, so that a long run fails early.

    `option` is the option that names the folder, for messages.

    Raises
    ------
    UsageError
        If that is not possible.
    OutputError
        If the disk is full or broken.
    """
    if path.is_dir() and path.suffix != ".zarr":
        raise UsageError(f"{path}: is a folder; choose another name for the result")
    probe = path.with_name(f".{path.name}.probe")
    try:
        make_folder(path.parent)
        probe.touch()
    except OSError as error:
        kind = OutputError if error.errno in _DISK_ERRORS else UsageError
        raise kind(f"{option} {path.parent}: {path.name} cannot be written there ({error.strerror})") from error
    finally:
        remove(probe)


def refuse_overwriting(output: Path, inputs: Iterable[str | Path], option: str = "--output-path") -> None:
    """Raise UsageError, which names `option`, if `output` is one of the files or folders read; URLs are skipped."""
    files = [Path(name) for name in inputs if "://" not in str(name)]
    if output.resolve() in [file.resolve() for file in files]:
        raise UsageError(f"{option} {output}: is also an input, which would be overwritten; choose another name")


def check_free_space(path: Path, n_bytes: int, advice: str = "") -> None:
    """Raise OutputError, ending in `advice`, if the disk of `path` has fewer than `n_bytes` free."""
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        raise OutputError(
            f"{path}: cannot be written: needs {n_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB free{advice}"
        )
