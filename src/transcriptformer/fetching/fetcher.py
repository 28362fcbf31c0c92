"""Resumable, verified downloads of single files.

Data is written to `<target>.part`. The journal `<target>.part.json` records the version of the remote file and the
progress of each byte range, so that a broken connection or a killed process loses little. The file is renamed to its
target once its size, its checksum and the caller's verification pass.
"""

import base64
import hashlib
import json
import logging
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import tenacity

from transcriptformer.errors import DownloadError, OutputError
from transcriptformer.storage.atomic import atomic_write, make_folder, move_file, remove, temporary_path
from transcriptformer.storage.lock import RunLock
from transcriptformer.storage.sealed import read_json
from transcriptformer.storage.sealed import write_json as write_sealed_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_DOWNLOADS = 3
"""Maximum downloads of a file that changes meanwhile or arrives damaged."""

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 20.0
"""Seconds to wait for a connection, and for more data."""

INITIAL_BACKOFF, MAX_BACKOFF = 0.5, 60.0
"""Seconds before a failed request is retried: exponential back-off with jitter."""

MAX_RETRY_AFTER = 600.0
"""Maximum seconds to wait if the server sends Retry-After."""

MIN_RANGE_BYTES = 2**23
"""Minimum bytes per connection."""

FLUSH_BYTES, FLUSH_SECONDS = 2**25, 1.0
"""The journal is updated after this many bytes or seconds."""

RESERVED_BYTES = 2**26
"""Free disk space to leave."""


class TransientDownloadError(DownloadError):
    """A transient failure of a request, which may be retried.

    Parameters
    ----------
    message
        Error message.
    wait
        Seconds that the server asks to wait before a retry.
    """

    def __init__(self, message: str, wait: float = 0) -> None:
        super().__init__(message)
        self.wait = min(wait, MAX_RETRY_AFTER)


class ChangedFileError(DownloadError):
    """The remote file changed during the download."""


class DamagedFileError(DownloadError):
    """The downloaded file is damaged; downloading it again may help."""


class RefusedFileError(DownloadError):
    """The downloaded file is unusable; downloading it again would not help."""


class Stat(NamedTuple):
    """Metadata of a remote file.

    Attributes
    ----------
    size
        Size in bytes.
    version
        ETag or modification date; None: range requests are not supported.
    checksum
        Algorithm and base64 value, if the server provides one.
    """

    size: int
    version: str | None
    checksum: tuple[str, str] | None = None


class RemoteFile(Protocol):
    """A remote file.

    Methods raise `TransientDownloadError` if a retry may help, otherwise `ChangedFileError` or `DownloadError`.
    """

    @property
    def name(self) -> str:
        """Address of the file, for messages."""
        ...

    def stat(self, start: int) -> Stat:
        """Fetch the metadata; `start` is where reading will probably begin."""
        ...

    def read(self, start: int, stop: int, version: str | None) -> Generator[bytes]:
        """Stream the bytes in [start, stop), possibly ending early; without a version, `start` is 0."""
        ...


@dataclass
class Fetcher:
    """Download files with retries, parallel connections and resumption.

    Attributes
    ----------
    retries
        Failed attempts without progress before giving up, not counting the first.
    connections
        Parallel connections per large file.
    advance
        Called with the number of bytes written to disk; negative if they are discarded.
    resumed
        Called with the number of bytes kept from an earlier attempt; negative if they are discarded.
    stopping
        Set it to stop as soon as possible; partial files stay for resumption.
    """

    retries: int = 5
    connections: int = 1
    advance: Callable[[int], object] = lambda n_bytes: None
    resumed: Callable[[int], object] = lambda n_bytes: None
    stopping: threading.Event = field(default_factory=threading.Event)

    def fetch(self, remote: RemoteFile, target: Path, verify: Callable[[Path], T]) -> T:
        """Download a file to `target`, resuming an earlier attempt, and return the result of `verify`.

        Parameters
        ----------
        verify
            Called with the complete file before it is renamed; raises `DamagedFileError` or `RefusedFileError`.

        Raises
        ------
        DownloadError
            If the download or a write fails; a partial file stays for resumption, unless it is damaged.
        """
        for attempts_left in reversed(range(MAX_DOWNLOADS)):
            stat = self.with_retries(remote.stat, PartialFile.first_missing_byte(target))
            part = PartialFile(target, stat, self.connections)
            n_resumed = part.n_done
            self.resumed(n_resumed)
            try:
                with translated_write_errors(target):
                    require_free_space(target.parent, stat.size - part.n_done)
                    self._fill(part, remote)
                    _check_bytes(part.path, stat, remote.name)
                    verified = verify(part.path)
                    part.finish()
                return verified
            except (ChangedFileError, DamagedFileError) as error:
                if self.stopping.is_set():
                    raise
                part.discard()
                self.resumed(-n_resumed)
                self.advance(n_resumed - part.n_done)
                if not attempts_left:
                    raise
                logger.warning("%s: %s; restarting the download", target, error)
            except RefusedFileError:
                part.discard()
                raise
        raise AssertionError

    def with_retries(
        self, request: Callable[..., T], *arguments: object, cancelled: threading.Event | None = None
    ) -> T:
        """Return the result of a request, retrying transient failures with exponential back-off."""
        stop_events = [self.stopping, *([cancelled] if cancelled else [])]
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientDownloadError),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self.retries + 1),
                *(tenacity.stop_when_event_set(event) for event in stop_events),
            ),
            wait=_backoff,
            sleep=lambda seconds: _sleep(seconds, stop_events),
            before_sleep=lambda state: logger.info("%s; retrying", state.outcome and state.outcome.exception()),
            reraise=True,
        )
        return retrying(request, *arguments)

    def _fill(self, part: "PartialFile", remote: RemoteFile) -> None:
        """Download all ranges in parallel."""
        cancelled = threading.Event()
        with part, ThreadPoolExecutor(min(self.connections, len(part.ranges))) as threads:
            jobs = [threads.submit(self._fill_range, part, i, remote, cancelled) for i in range(len(part.ranges))]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException as error:
                cancelled.set()
                if not isinstance(error, Exception):  # such as Ctrl-C, which must not wait for back-offs
                    self.stopping.set()
                raise

    def _fill_range(self, part: "PartialFile", i: int, remote: RemoteFile, cancelled: threading.Event) -> None:
        while not part.ranges[i].is_done:
            self.with_retries(self._request_range, part, part.ranges[i], remote, cancelled, cancelled=cancelled)

    def _request_range(
        self, part: "PartialFile", byte_range: "ByteRange", remote: RemoteFile, cancelled: threading.Event
    ) -> None:
        """Send one request; a failure after progress does not count as an attempt."""
        start, stop_events = byte_range.next, [self.stopping, cancelled]
        try:
            _raise_if_set(stop_events, remote.name)
            with closing(remote.read(start, byte_range.stop, part.version)) as stream:
                for data in stream:
                    _raise_if_set(stop_events, remote.name)
                    self.advance(part.write(byte_range, data))
                    if byte_range.is_done:
                        break
            if not byte_range.is_done:
                raise TransientDownloadError(f"{remote.name}: {byte_range.stop - byte_range.next} bytes are missing")
        except TransientDownloadError as error:
            if part.version is None:  # no range requests: restart
                self.advance(start - byte_range.next)
                byte_range.rewind()
            if byte_range.next == start:
                raise
            logger.info("%s; resuming", error)
            _sleep(INITIAL_BACKOFF, stop_events)


@dataclass
class ByteRange:
    """Byte range of a file, downloaded up to `next`.

    Attributes
    ----------
    start, stop
        First byte, and one past the last.
    next
        First missing byte.
    crc
        CRC-32 of the downloaded bytes.
    """

    start: int
    stop: int
    next: int
    crc: int = 0

    @classmethod
    def between(cls, start: int, stop: int) -> "ByteRange":
        """Create a range with nothing downloaded."""
        return cls(start, stop, start)

    def rewind(self) -> None:
        """Forget the downloaded bytes."""
        self.next, self.crc = self.start, 0

    def is_intact(self, path: Path) -> bool:
        """Whether the CRC-32 of the bytes on disk matches."""
        crc, left = 0, self.next - self.start
        try:
            with path.open("rb") as file:
                file.seek(self.start)
                while left > 0 and (block := file.read(min(left, 2**20))):
                    crc, left = zlib.crc32(block, crc), left - len(block)
        except OSError:
            return False
        return left == 0 and crc == self.crc

    @property
    def is_done(self) -> bool:
        """Whether the range is complete."""
        return self.next >= self.stop


class PartialFile:
    """A partially downloaded file and its journal.

    Parameters
    ----------
    target
        Path of the complete file.
    stat
        Metadata of the remote file; data of another version is discarded.
    connections
        Maximum number of ranges.
    """

    def __init__(self, target: Path, stat: Stat, connections: int) -> None:
        self.target, self.size, self.version = target, stat.size, stat.version
        self.path = part_path(target)
        self.journal = journal_path(target)
        self.ranges = self._resumable_ranges() or _split(stat.size, connections if stat.version else 1)
        self._lock, self._unsaved, self._last_save = threading.Lock(), 0, time.monotonic()

    @property
    def n_done(self) -> int:
        """Number of bytes on disk."""
        return self.size - sum(byte_range.stop - byte_range.next for byte_range in self.ranges)

    def __enter__(self) -> None:
        make_folder(self.target.parent)
        if not self.n_done:
            self.journal.unlink(missing_ok=True)  # before any data: a stale journal must not describe new data
            remove_part(self.target)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)

    def __exit__(self, *unused: object) -> None:
        try:
            self._save_journal()
        finally:
            os.close(self._file)

    def write(self, byte_range: ByteRange, data: bytes) -> int:
        """Append the bytes that fit into a range, and return their number."""
        data = data[: byte_range.stop - byte_range.next]
        n_written = os.pwrite(self._file, data, byte_range.next)
        while n_written < len(data):
            n_written += os.pwrite(self._file, data[n_written:], byte_range.next + n_written)
        with self._lock:  # another thread may save the journal
            byte_range.crc = zlib.crc32(data, byte_range.crc)
            byte_range.next += n_written
            self._unsaved += n_written
            if self._unsaved > FLUSH_BYTES or time.monotonic() - self._last_save > FLUSH_SECONDS:
                self._save_journal()
        return n_written

    def finish(self) -> None:
        """Rename the complete file to its target."""
        move_file(self.path, self.target)
        remove_part(self.target)

    def discard(self) -> None:
        """Delete the partial file and its journal; an existing target stays."""
        remove_part(self.target)

    def _save_journal(self) -> None:
        """Sync the data, then record the progress of each range."""
        progress = [astuple(byte_range) for byte_range in self.ranges]
        os.fsync(self._file)
        write_sealed_json(self.journal, {"version": self.version, "size": self.size, "ranges": progress})
        self._unsaved, self._last_save = 0, time.monotonic()

    def _resumable_ranges(self) -> list[ByteRange]:
        """Return the ranges of an earlier attempt at the same version, if any; damaged ones are rewound."""
        found = _read_journal(self.target)
        if found is None and self.journal.exists():
            logger.warning("%s: damaged; restarting the download", self.journal)
        if not (self.version and found and (found.version, found.size) == (self.version, self.size)):
            return []
        for byte_range in found.ranges:
            if not byte_range.is_intact(self.path):
                logger.warning("%s: damaged; downloading the damaged part again", self.path)
                byte_range.rewind()
        return found.ranges

    @staticmethod
    def first_missing_byte(target: Path) -> int:
        """Return the first byte missing after an earlier attempt, or the last byte if none is missing."""
        found = _read_journal(target)
        return min([s.next for s in found.ranges if not s.is_done] or [max(0, found.size - 1)]) if found else 0


class _Journal(NamedTuple):
    version: str | None
    size: int
    ranges: list[ByteRange]


def _read_journal(target: Path) -> _Journal | None:
    """Read the journal of a partial file; None if it is missing, damaged or claims more bytes than there are."""
    try:
        found = read_json(journal_path(target))
        ranges = [ByteRange(*numbers) for numbers in found["ranges"]]
        furthest = max(byte_range.next if byte_range.next > byte_range.start else 0 for byte_range in ranges)
        is_complete = part_path(target).stat().st_size >= furthest
        return _Journal(found["version"], found["size"], ranges) if is_complete else None
    except (OutputError, OSError, ValueError, KeyError, TypeError):
        return None


def remove_part(target: Path) -> None:
    """Delete a partial file and its journal, ignoring errors."""
    journal = journal_path(target)
    for path in (temporary_path(journal), journal, part_path(target)):  # a journal must not outlive its data
        remove(path)


def part_path(target: Path) -> Path:
    """Path of a partial file."""
    return target.with_name(f"{target.name}.part")


def journal_path(target: Path) -> Path:
    """Path of the journal of a partial file."""
    return target.with_name(f"{target.name}.part.json")


def _split(size: int, connections: int) -> list[ByteRange]:
    """Split a file into ranges of similar size, at least `MIN_RANGE_BYTES` each."""
    n = max(1, min(connections, size // MIN_RANGE_BYTES))
    borders = [size * i // n for i in range(n + 1)]
    return [ByteRange.between(start, stop) for start, stop in pairwise(borders)]


def is_transient(status: int) -> bool:
    """Whether a retry may help after a response with this status."""
    return status in (408, 425, 429) or status >= 500


def _sleep(seconds: float, stop_events: Sequence[threading.Event]) -> None:
    """Sleep until one of the events is set."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not any(event.is_set() for event in stop_events):
        time.sleep(min(left, 0.1))


def _raise_if_set(stop_events: Sequence[threading.Event], name: str) -> None:
    if any(event.is_set() for event in stop_events):
        raise DownloadError(f"{name}: stopped")


def _backoff(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    exponential = tenacity.wait_exponential(multiplier=INITIAL_BACKOFF, max=MAX_BACKOFF)
    jittered = (exponential + tenacity.wait_random(0, INITIAL_BACKOFF))(state)
    return max(jittered, error.wait) if isinstance(error, TransientDownloadError) else jittered


def _check_bytes(path: Path, stat: Stat, name: str) -> None:
    """Verify size and checksum."""
    size = path.stat().st_size
    if size != stat.size:
        raise DamagedFileError(f"{name}: received {size} bytes instead of {stat.size}")
    if stat.checksum is not None and checksum(path, stat.checksum[0]) != stat.checksum[1]:
        raise DamagedFileError(f"{name}: {stat.checksum[0].upper()} checksum mismatch")


def checksum(path: Path, algorithm: str) -> str:
    """Return the base64 checksum of a file; `algorithm` is `crc32` or a name known to `hashlib`."""
    with path.open("rb") as file:
        if algorithm != "crc32":
            return base64.b64encode(hashlib.file_digest(file, algorithm).digest()).decode()
        value = 0
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def require_free_space(folder: Path, n_bytes: int) -> None:
    """Raise DownloadError if the disk of `folder`, which is created, has fewer than `n_bytes` to spare."""
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    if free < n_bytes + RESERVED_BYTES:
        raise DownloadError(
            f"{folder}: needs {format_size(n_bytes + RESERVED_BYTES)}, {format_size(free)} free; free up space and "
            "rerun the same command"
        )


def size_on_disk(target: Path) -> int:
    """Return the disk space that a partial file already takes, in bytes."""
    part = part_path(target)
    return part.stat().st_blocks * 512 if part.exists() else 0


def format_size(n_bytes: float) -> str:
    """Format a number of bytes in MB or GB."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"


@contextmanager
def translated_write_errors(path: Path) -> Iterator[None]:
    """Translate write errors to DownloadError."""
    kept = "files downloaded so far are kept; rerun the same command to resume"
    try:
        yield
    except OSError as error:
        raise DownloadError(f"{path}: cannot be written: {error.strerror or error}; {kept}") from error
    except OutputError as error:
        raise DownloadError(f"{error}; {kept}") from error


def write_json(path: Path, values: object) -> None:
    """Atomically write a small JSON file."""
    with translated_write_errors(path), atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")


@contextmanager
def exclusive_lock(lock: Path) -> Iterator[None]:
    """Hold a lock file exclusively, waiting for other runs to release it."""
    with translated_write_errors(lock):
        make_folder(lock.parent)
        holder = RunLock(lock)
        holder.wait(lock.parent)
    try:
        yield
    finally:
        holder.release()
