"""Archives become folders, and nothing else."""

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from transcriptformer.fetch import DamagedFileError, RefusedFileError, need_space, writing_to

DAMAGE = (tarfile.ReadError, gzip.BadGzipFile, EOFError, zlib.error)
"""What reading a truncated or damaged archive leads to."""


def unpack(archive: Path, name: str, into: Path, advance: Callable[[int], object] = lambda n_bytes: None) -> None:
    """Unpack the one folder `name` of a `.tar.gz` as `into`, which must not exist yet.

    Parameters
    ----------
    advance
        Called with the size of each file that has been unpacked.

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
            into.mkdir(parents=True)
            _unpack(archive, name, into, advance)
    except BaseException:
        shutil.rmtree(into, ignore_errors=True)
        raise


def _unpack(archive: Path, name: str, into: Path, advance: Callable[[int], object]) -> None:
    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as members:
                for member in members:
                    _unpack_member(members, member, name, into)
                    advance(member.size)
            while stream.read(2**20):  # on to the end, where gzip's checksum is
                pass
    except DAMAGE as error:
        raise DamagedFileError(f"{archive}: truncated or damaged ({error})") from error
    except (tarfile.FilterError, ValueError) as error:
        raise RefusedFileError(f"{archive}: {error}; nothing of it is kept") from error


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
