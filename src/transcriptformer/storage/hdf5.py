"""HDF5 files that are written through Python, so that a failed write ends in an exception.

HDF5 itself takes the process down when it cannot write a file back: it closes files at exit, and reads its own metadata
again after it has left the cache. It is therefore never told. What cannot be written is kept in memory, where HDF5
finds it until the file is closed; the failure is raised between two blocks, or at the end, and so is what signal
handlers would raise in the midst of HDF5's calls.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from transcriptformer.runtime.signals import noting


class NewHdf5(h5py.File):  # type: ignore[misc]  # h5py has no types
    """An HDF5 file that is being written."""

    def __init__(self, path: Path, raise_signals: Callable[[], None]) -> None:
        self._raw, self._raise_signals = _NeverFailing(path), raise_signals
        super().__init__(self._raw, "w")

    def check(self) -> None:
        """Raise what has kept bytes from being written, if anything has, and what a signal is to raise."""
        self._raise_signals()
        if self._raw.failure is not None:
            raise self._raw.failure


@contextmanager
def new_hdf5(path: Path) -> Iterator[NewHdf5]:
    """Create an HDF5 file and close it.

    Raises
    ------
    OSError
        If something could not be written; the file is of no use then.
    """
    with noting() as raise_signals:
        file = NewHdf5(path, raise_signals)
        try:
            yield file
        finally:
            file.close()
            file._raw.close()
        file.check()


class _NeverFailing(io.RawIOBase):
    """A file for `h5py.File` to write to and read from, in which both always seem to succeed.

    Attributes
    ----------
    failure
        The first exception.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self.failure: BaseException | None = None
        self._place, self._size = 0, 0
        self._kept: list[tuple[int, bytes]] = []

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; the end is where it would be had nothing failed."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def write(self, data: Any) -> int:
        """Write all of `data`, to memory once something has failed."""
        view = memoryview(data).cast("B")
        n_written = 0
        try:
            while self.failure is None and n_written < len(view):
                n_written += os.pwrite(self._descriptor, view[n_written:], self._place + n_written)
        except BaseException as error:
            self.failure = error
        if n_written < len(view):
            self._kept.append((self._place + n_written, bytes(view[n_written:])))
        self._place += len(view)
        self._size = max(self._size, self._place)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        """Read what was written, with zeros in between."""
        view = memoryview(buffer).cast("B")
        n_read = 0
        try:
            while (n := os.preadv(self._descriptor, [view[n_read:]], self._place + n_read)) > 0:
                n_read += n
        except BaseException as error:
            self.failure = self.failure or error
        view[n_read:] = bytes(len(view) - n_read)
        for start, kept in self._kept:
            first, last = max(start, self._place), min(start + len(kept), self._place + len(view))
            if first < last:
                view[first - self._place : last - self._place] = kept[first - start : last - start]
        self._place += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Change the length."""
        self._size = self._place if size is None else size
        if self.failure is None:
            try:
                os.ftruncate(self._descriptor, self._size)
            except BaseException as error:
                self.failure = error
        return self._size

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Close the file, once."""
        if not self.closed:
            super().close()
            try:
                os.close(self._descriptor)
            except OSError as error:  # such as a quota, of which some file systems tell only now
                self.failure = self.failure or error
