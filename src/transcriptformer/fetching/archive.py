"""Safe unpacking of archives that contain a single folder."""

import gzip
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Self

from transcriptformer.fetching.fetcher import (
    DamagedFileError,
    RefusedFileError,
    require_free_space,
    translated_write_errors,
)

DAMAGE = (tarfile.ReadError, gzip.BadGzipFile, EOFError, zlib.error)
"""Exceptions raised on reading a truncated or damaged archive."""

MAX_HEADER_BYTES = 2**20
"""Maximum size of an extended header, which is read into memory at once."""

MAX_TRAILING_BYTES = 2**26
"""Maximum padding after the last member, in bytes; archivers fill their last block."""


def unpack(archive: Path, name: str, into: Path) -> None:
    """Unpack the single folder `name` of a `.tar.gz` to `into`, which must be empty or missing.

    `into` is removed on any error.

    Raises
    ------
    DamagedFileError
        If the archive is truncated or damaged.
    RefusedFileError
        If it contains anything but regular files and folders within that folder.
    DownloadError
        If the disk is full.
    """
    try:
        with translated_write_errors(into):
            into.mkdir(parents=True, exist_ok=True)
            _unpack(archive, name, into)
    except BaseException:
        shutil.rmtree(into, ignore_errors=True)
        raise


def _unpack(archive: Path, name: str, into: Path) -> None:
    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as members:
                for member in members:
                    _unpack_member(members, member, name, into)
            n_left = 0
            while block := stream.read(2**20):  # read to the end to verify gzip's checksum
                n_left += len(block)
                if n_left > MAX_TRAILING_BYTES:
                    raise ValueError("trailing data after the last member")
    except DAMAGE as error:
        raise DamagedFileError(f"{archive}: truncated or damaged ({error})") from error
    except (tarfile.FilterError, ValueError, OverflowError) as error:
        raise RefusedFileError(f"{archive}: {error}; the archive was not unpacked") from error


class _Member(tarfile.TarInfo):
    """Archive member with a strictly checked header; `tarfile` takes a damaged header for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the regular end
            return super().frombuf(buf, encoding, errors)
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        if not (member.isreg() or member.isdir()) and member.size > MAX_HEADER_BYTES:
            raise ValueError(f"header of {member.size} bytes, more than {MAX_HEADER_BYTES}")
        return member


def _unpack_member(members: tarfile.TarFile, member: tarfile.TarInfo, name: str, into: Path) -> None:
    """Unpack one file or folder, if its path is inside the expected folder."""
    path = PurePosixPath(member.name)
    if not path.parts or path.name.startswith("._"):  # the archive's root, or macOS metadata
        return
    if path.is_absolute() or ".." in path.parts or path.parts[0] != name:
        raise ValueError(f"{member.name!r} is outside the expected folder, {name!r}")
    if not (member.isreg() or member.isdir()):
        raise ValueError(f"{member.name!r} is a link or a device, not a file or folder")
    require_free_space(into.parent, member.size)
    if len(path.parts) > 1:
        members.extract(member.replace(name=str(PurePosixPath(*path.parts[1:]))), into, filter="data")
