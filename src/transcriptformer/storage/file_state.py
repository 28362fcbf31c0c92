"""Whether a file is still the one that was looked at."""

from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """What changes when a file is replaced or modified."""

    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """Return the current state of a file; OSError if it is gone."""
        found = path.stat()
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)
