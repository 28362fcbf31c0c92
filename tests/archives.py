"""Valid and malicious archives for tests."""

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path


def pack(folder: Path, archive: Path, name: str) -> Path:
    """Pack a folder as a `.tar.gz`, with `name` as the only top-level folder."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=name)
    return archive


def pack_members(archive: Path, members: Iterable[tarfile.TarInfo], content: bytes = b"content") -> Path:
    """Pack these members only; regular files get `content`."""
    with tarfile.open(archive, "w:gz") as tar:
        for member in members:
            if member.isreg():
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return archive


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


HOSTILE: dict[str, Callable[[str], list[tarfile.TarInfo]]] = {
    "a path with ..": lambda name: [member(f"{name}/../../outside")],
    "a path that ends in ..": lambda name: [member(f"{name}/..", tarfile.DIRTYPE)],
    "an absolute path": lambda name: [member("/tmp/outside-of-the-folder")],
    "another folder": lambda name: [member("other/config.json")],
    "a file instead of the folder": lambda name: [member("config.json")],
    "a link out of the folder": lambda name: [member(f"{name}/link", tarfile.SYMTYPE, "../../outside")],
    "an absolute link": lambda name: [member(f"{name}/link", tarfile.SYMTYPE, "/etc/passwd")],
    "a file through a link": lambda name: [
        member(f"{name}/link", tarfile.SYMTYPE, "../.."),
        member(f"{name}/link/outside"),
    ],
    "a hard link": lambda name: [member(f"{name}/link", tarfile.LNKTYPE, "../../outside")],
    "a device": lambda name: [member(f"{name}/device", tarfile.CHRTYPE)],
    "a pipe": lambda name: [member(f"{name}/pipe", tarfile.FIFOTYPE)],
}
"""Members that must not be unpacked, by description and given the name of the expected folder."""
