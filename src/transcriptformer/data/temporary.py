"""Decompressed copies of gzipped files in the folder for temporary files, which `TMPDIR` sets."""

import errno
import gzip
import logging
import os
import shutil
import tempfile
import weakref
import zlib
from contextlib import suppress
from pathlib import Path

from transcriptformer.errors import DataError, UsageError, one_line

logger = logging.getLogger(__name__)

_GZIP, _HDF5 = b"\x1f\x8b", b"\x89HDF\r\n\x1a\n"
"""First bytes of the formats."""

_SIZE_MODULUS = 2**32
"""A gzip file ends with its uncompressed size modulo this."""


class TemporaryCopy:
    """File that is deleted with this object or when the process that created it ends.

    A pickled copy refers to the file, but does not delete it; neither does a forked process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        weakref.finalize(self, _remove, path, os.getpid())


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:
        with suppress(OSError):
            path.unlink()


def is_gzipped(path: Path) -> bool:
    """Whether a file is compressed with gzip."""
    with path.open("rb") as file:
        return file.read(len(_GZIP)) == _GZIP


def decompress(path: Path) -> TemporaryCopy:
    """Decompress a gzipped HDF5 file to a temporary file.

    Raises
    ------
    DataError
        If the file is damaged, or is not an HDF5 file.
    UsageError
        If the temporary folder is full.
    """
    try:
        with gzip.open(path) as source:
            if source.read(len(_HDF5)) != _HDF5:
                raise DataError(f"{path}: gzipped, but not an HDF5 file inside; expected an h5ad file")
            source.seek(0)
            _check_space(path)
            return _copy(source, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be decompressed: truncated or damaged ({one_line(error)})") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(path, "more") from error
        raise DataError(f"{path}: cannot be decompressed ({one_line(error)})") from error


def _copy(source: gzip.GzipFile, path: Path) -> TemporaryCopy:
    descriptor, name = tempfile.mkstemp(prefix="transcriptformer-", suffix=".h5ad")
    copy = TemporaryCopy(Path(name))
    with os.fdopen(descriptor, "wb") as target:
        logger.info("%s: decompressing to a temporary file, %s (set TMPDIR for another folder)", path, name)
        shutil.copyfileobj(source, target, 2**20)
    return copy


def _check_space(path: Path) -> None:
    """Check that at least the smallest possible uncompressed size is free."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        needed = int.from_bytes(file.read(), "little")
    while size > _SIZE_MODULUS and needed < 0.99 * size:  # data that is compressed already hardly shrinks
        needed += _SIZE_MODULUS
    if needed > shutil.disk_usage(tempfile.gettempdir()).free:
        raise _no_space(path, f"{needed / 2**30:.1f} GiB")


def _no_space(path: Path, needed: str) -> UsageError:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / 2**30
    return UsageError(
        f"--data-file {path}: decompressing takes {needed}, but only {free:.1f} GiB are free in {folder}; set TMPDIR "
        "to another folder, or decompress it with gunzip"
    )
