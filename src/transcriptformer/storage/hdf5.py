"""HDF5 files written through a Python file object, so that failed writes raise exceptions.

The HDF5 library may crash after a failed write, when it closes files at exit or re-reads evicted metadata. Write errors
are therefore hidden from it: unwritten bytes are kept in memory and served from there until the file is closed. The
error is raised between blocks or at the end, and so are exceptions of signal handlers.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from transcriptformer.runtime.signals import DeferredSignals, deferred_signals


class NewHdf5(h5py.File):  # type: ignore[misc]  # h5py has no types
    """An HDF5 file open for writing.

    Attributes
    ----------
    signals
        Signals deferred until `check` or the end of writing.
    """

    def __init__(self, path: Path, signals: DeferredSignals) -> None:
        # Opened here, because Python closes a file object even if its constructor has failed.
        self._raw = _NeverFailing(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666))
        self.signals = signals
        super().__init__(self._raw, "w")

    def check(self) -> None:
        """Raise the first write error, if any, and run deferred signal handlers."""
        self.signals.run()
        if self._raw.failure is not None:
            raise self._raw.failure


@contextmanager
def new_hdf5(path: Path) -> Iterator[NewHdf5]:
    """Create an HDF5 file, and close it at the end of the block.

    Raises
    ------
    OSError
        If a write failed; the file is unusable.
    """
    with deferred_signals() as signals:
        file = NewHdf5(path, signals)
        try:
            yield file
        finally:
            file.close()
            file._raw.close()
        file.check()


class _NeverFailing(io.RawIOBase):
    """File object for `h5py.File` whose reads and writes never raise.

    Attributes
    ----------
    failure
        The first exception.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.failure: BaseException | None = None
        self._position, self._size = 0, 0
        self._kept: list[tuple[int, bytes]] = []

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position; the size includes failed writes."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def write(self, data: Any) -> int:
        """Write all of `data`, to memory after the first failure."""
        view = memoryview(data).cast("B")
        n_written = 0
        try:
            while self.failure is None and n_written < len(view):
                n_written += os.pwrite(self._descriptor, view[n_written:], self._position + n_written)
        except BaseException as error:
            self.failure = error
        if n_written < len(view):
            self._kept.append((self._position + n_written, bytes(view[n_written:])))
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        """Read what was written; gaps are zeros."""
        view = memoryview(buffer).cast("B")
        n_read = 0
        try:
            while (n := os.preadv(self._descriptor, [view[n_read:]], self._position + n_read)) > 0:
                n_read += n
        except BaseException as error:
            self.failure = self.failure or error
        view[n_read:] = bytes(len(view) - n_read)
        for start, kept in self._kept:
            first, last = max(start, self._position), min(start + len(kept), self._position + len(view))
            if first < last:
                view[first - self._position : last - self._position] = kept[first - start : last - start]
        self._position += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Change the size."""
        self._size = self._position if size is None else size
        if self.failure is None:
            try:
                os.ftruncate(self._descriptor, self._size)
            except BaseException as error:
                self.failure = error
        return self._size

    def flush(self) -> None:
        """Do nothing: writes are unbuffered."""

    def close(self) -> None:
        """Close the file; further calls have no effect."""
        if not self.closed:
            super().close()
            try:
                os.close(self._descriptor)
            except OSError as error:  # some file systems report an exceeded quota only on close
                self.failure = self.failure or error
