"""Archives become folders, and nothing else."""

import gzip
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Self

from transcriptformer.fetching.fetcher import DamagedFileError, RefusedFileError, need_space, writing_to

DAMAGE = (tarfile.ReadError, gzip.BadGzipFile, EOFError, zlib.error)
"""What reading a truncated or damaged archive leads to."""


LARGEST_HEADER = 2**20
"""Bytes of a header before a member; they are read into memory at once."""

LONGEST_END = 2**26
"""Bytes that may follow the last member; archivers fill up their last block."""


def unpack(archive: Path, name: str, into: Path) -> None:
    """Unpack the one folder `name` of a `.tar.gz` as `into`, which is empty or does not exist yet.

    Raises
    ------
    DamagedFileError
        If the archive is truncated or damaged.
    RefusedFileError
        If it holds anything but regular files and folders within its one folder.
    DownloadError
        If there is no room for what it holds.

    Whatever is raised, what was unpacked by then is removed.
    """
    try:
        with writing_to(into):
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
            while block := stream.read(2**20):  # on to the end, where gzip's checksum is
                n_left += len(block)
                if n_left > LONGEST_END:
                    raise ValueError("goes on after its end")
    except DAMAGE as error:
        raise DamagedFileError(f"{archive}: truncated or damaged ({error})") from error
    except (tarfile.FilterError, ValueError, OverflowError) as error:
        raise RefusedFileError(f"{archive}: {error}; nothing of it is kept") from error


class _Member(tarfile.TarInfo):
    """A member whose header must be whole, and of a sensible size; `tarfile` takes a damaged one for the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end as it should be
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if not (member.isreg() or member.isdir()) and member.size > LARGEST_HEADER:
            raise ValueError(f"a header of {member.size} bytes")
        return member


def _unpack_member(members: tarfile.TarFile, member: tarfile.TarInfo, name: str, into: Path) -> None:
    """One file or folder, if it is where it should be."""
    path = PurePosixPath(member.name)
    if not path.parts or path.name.startswith("._"):  # the archive's own root; what macOS's archiver adds
        return
    if path.is_absolute() or ".." in path.parts or path.parts[0] != name:
        raise ValueError(f"{member.name!r} is outside of the one folder that is expected, {name!r}")
    if not (member.isreg() or member.isdir()):
        raise ValueError(f"{member.name!r} is a link or a device, where only files and folders are expected")
    need_space(into.parent, member.size)
    if len(path.parts) > 1:
        members.extract(member.replace(name=str(PurePosixPath(*path.parts[1:]))), into, filter="data")
