"""A remote file comes to disk: whole, once, verified.

What arrives goes to `<target>.part`. `<target>.part.json` tells of which version of the remote file it is, and how far
each stretch of it has come, so that a broken connection or a killed process costs what was on its way. The file gets
its name when size and checksum are right and whoever wanted it has looked into it.
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

import filelock
import tenacity

from transcriptformer.errors import DownloadError, OutputError
from transcriptformer.storage.atomic import atomic_write, make_folder, remove, temporary_path
from transcriptformer.storage.sealed import read_json, sealed_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

STARTS = 3
"""How often a file is begun anew, because it changed on the way or arrived damaged."""

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 20.0
"""Seconds to wait for a connection, and for the next bytes."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before a failed request is tried again; they double each time, and something random is added."""

LONGEST_ORDERED_WAIT = 600.0
"""The most of it when the server says how long (Retry-After)."""

LEAST_STRETCH = 2**23
"""Bytes that are worth a connection of their own."""

BYTES_AT_RISK, SECONDS_AT_RISK = 2**25, 1.0
"""What may arrive, and how long it may take, before it is noted how far a stretch has come."""

BYTES_TO_SPARE = 2**26
"""Free space that is left alone."""


class InterruptedDownloadError(DownloadError):
    """A request failed in a way that may pass: it is worth another try.

    Parameters
    ----------
    message
        What happened.
    wait
        Seconds that the server asks to wait.
    """

    def __init__(self, message: str, wait: float = 0) -> None:
        super().__init__(message)
        self.wait = min(wait, LONGEST_ORDERED_WAIT)


class ChangedFileError(DownloadError):
    """The remote file is not the one that was begun."""


class DamagedFileError(DownloadError):
    """What arrived is not what it should be; another try may help."""


class RefusedFileError(DownloadError):
    """What arrived is not wanted, and would not be next time."""


class Stat(NamedTuple):
    """What is known of a remote file before it is read.

    Attributes
    ----------
    size
        In bytes.
    version
        Changes when the file does (ETag or date); None: it cannot be read in parts.
    checksum
        Its algorithm and base64 value, if the server tells.
    """

    size: int
    version: str | None
    checksum: tuple[str, str] | None = None


class RemoteFile(Protocol):
    """A file somewhere else.

    Its methods raise `InterruptedDownloadError` where another try may help, `ChangedFileError`, or `DownloadError`.
    """

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def stat(self, start: int) -> Stat:
        """What is known of it; reading is likely to begin at `start`."""
        ...

    def read(self, start: int, stop: int, version: str | None) -> Generator[bytes]:
        """Bytes from `start` to before `stop` as they arrive, maybe fewer; without a version, `start` is 0."""
        ...


@dataclass
class Fetcher:
    """How files are fetched.

    Attributes
    ----------
    retries
        Tries in a row that may bring nothing, after the first.
    connections
        By which a large file is read at once.
    advance
        Called with the number of bytes that came to disk; negative where they were of no use.
    found
        Called with the number of those that an earlier try had brought.
    stopping
        Set: give up as soon as possible, which leaves what can be resumed.
    """

    retries: int = 5
    connections: int = 1
    advance: Callable[[int], object] = lambda n_bytes: None
    found: Callable[[int], object] = lambda n_bytes: None
    stopping: threading.Event = field(default_factory=threading.Event)

    def fetch(self, remote: RemoteFile, target: Path, verify: Callable[[Path], T]) -> T:
        """Bring a file to `target`, going on with what an earlier try left.

        Parameters
        ----------
        verify
            Looks into the file before it gets its name, raises `DamagedFileError` or tells what it saw.

        Raises
        ------
        DownloadError
            If it cannot be had or written; what is there of it stays for the next try, unless it was damaged.
        """
        for starts_left in reversed(range(STARTS)):
            stat = self.patiently(remote.stat, PartialFile.reached(target))
            part = PartialFile(target, stat, self.connections)
            n_found = part.n_done
            self.found(n_found)
            try:
                with writing_to(target):
                    need_space(target.parent, stat.size - part.n_done)
                    self._fill(part, remote)
                    _check_bytes(part.path, stat, remote.name)
                    seen = verify(part.path)
                    part.finish()
                return seen
            except (ChangedFileError, DamagedFileError) as error:
                if self.stopping.is_set():
                    raise
                part.discard()
                self.found(-n_found)
                self.advance(n_found - part.n_done)
                if not starts_left:
                    raise
                logger.warning("%s: %s; starting anew", target, error)
            except RefusedFileError:
                part.discard()
                raise
        raise AssertionError

    def patiently(self, request: Callable[..., T], *arguments: object, given_up: threading.Event | None = None) -> T:
        """The result of a request, which is repeated when it is interrupted, after longer and longer waits."""
        ends = [self.stopping, *([given_up] if given_up else [])]
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(InterruptedDownloadError),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self.retries + 1), *(tenacity.stop_when_event_set(end) for end in ends)
            ),
            wait=_wait,
            sleep=lambda seconds: _pause(seconds, ends),
            before_sleep=lambda state: logger.info("%s; trying again", state.outcome and state.outcome.exception()),
            reraise=True,
        )
        return retrying(request, *arguments)

    def _fill(self, part: "PartialFile", remote: RemoteFile) -> None:
        """Read every stretch to its end, all at once."""
        given_up = threading.Event()
        with part, ThreadPoolExecutor(min(self.connections, len(part.stretches))) as threads:
            jobs = [threads.submit(self._fill_stretch, part, i, remote, given_up) for i in range(len(part.stretches))]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException as error:
                given_up.set()
                if not isinstance(error, Exception):  # such as Ctrl-C, which does not wait for waits
                    self.stopping.set()
                raise

    def _fill_stretch(self, part: "PartialFile", i: int, remote: RemoteFile, given_up: threading.Event) -> None:
        while not part.stretches[i].is_done:
            self.patiently(self._read_on, part, part.stretches[i], remote, given_up, given_up=given_up)

    def _read_on(self, part: "PartialFile", stretch: "Stretch", remote: RemoteFile, given_up: threading.Event) -> None:
        """One request; an interruption does not count if it came with bytes that can be kept."""
        start, ends = stretch.next, [self.stopping, given_up]
        try:
            _raise_if_any(ends, remote.name)
            with closing(remote.read(start, stretch.stop, part.version)) as arriving:
                for data in arriving:
                    _raise_if_any(ends, remote.name)
                    self.advance(part.write(stretch, data))
                    if stretch.is_done:
                        break
            if not stretch.is_done:
                raise InterruptedDownloadError(f"{remote.name}: {stretch.stop - stretch.next} bytes did not come")
        except InterruptedDownloadError as error:
            if part.version is None:  # the next try begins at the beginning
                self.advance(start - stretch.next)
                stretch.rewind()
            if stretch.next == start:
                raise
            logger.info("%s; going on", error)
            _pause(FIRST_WAIT, ends)


@dataclass
class Stretch:
    """Consecutive bytes of a file, of which those before `next` are on disk.

    Attributes
    ----------
    start, stop
        The first byte, and the one after the last.
    next
        The first byte that is missing.
    crc
        CRC-32 of those that are there.
    """

    start: int
    stop: int
    next: int
    crc: int = 0

    @classmethod
    def between(cls, start: int, stop: int) -> "Stretch":
        """Bytes none of which is there."""
        return cls(start, stop, start)

    def rewind(self) -> None:
        """Begin again."""
        self.next, self.crc = self.start, 0

    def is_as_written(self, path: Path) -> bool:
        """Whether the bytes on disk are those that arrived."""
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
        """Whether all of them are."""
        return self.next >= self.stop


class PartialFile:
    """What there is of a file that is being fetched.

    Parameters
    ----------
    target
        The file to be.
    stat
        Of the remote file; what is there of another version is dropped.
    connections
        Into how many stretches it is cut, if it is large.
    """

    def __init__(self, target: Path, stat: Stat, connections: int) -> None:
        self.target, self.size, self.version = target, stat.size, stat.version
        self.path = part_of(target)
        self.journal = journal_of(target)
        self.stretches = self._left_over() or _cut(stat.size, connections if stat.version else 1)
        self._lock, self._at_risk, self._noted = threading.Lock(), 0, time.monotonic()

    @property
    def n_done(self) -> int:
        """Bytes on disk."""
        return self.size - sum(stretch.stop - stretch.next for stretch in self.stretches)

    def __enter__(self) -> None:
        make_folder(self.target.parent)
        if not self.n_done:
            self.journal.unlink(missing_ok=True)  # it must not vouch for what comes now
            clear_part(self.target)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)

    def __exit__(self, *unused: object) -> None:
        try:
            self._note()
        finally:
            os.close(self._file)

    def write(self, stretch: Stretch, data: bytes) -> int:
        """Add bytes to a stretch, as far as they belong to it, and tell how many."""
        data = data[: stretch.stop - stretch.next]
        n_written = os.pwrite(self._file, data, stretch.next)
        while n_written < len(data):
            n_written += os.pwrite(self._file, data[n_written:], stretch.next + n_written)
        with self._lock:  # both, for another thread may note them
            stretch.crc = zlib.crc32(data, stretch.crc)
            stretch.next += n_written
            self._at_risk += n_written
            if self._at_risk > BYTES_AT_RISK or time.monotonic() - self._noted > SECONDS_AT_RISK:
                self._note()
        return n_written

    def finish(self) -> None:
        """Give the file its name."""
        self.path.replace(self.target)
        clear_part(self.target)

    def discard(self) -> None:
        """Leave nothing of it; the target, if there is an older one, stays."""
        clear_part(self.target)

    def _note(self) -> None:
        """Write down how far each stretch has come, after what it has is on disk."""
        reached = [astuple(stretch) for stretch in self.stretches]
        os.fsync(self._file)
        with atomic_write(self.journal) as temporary:
            temporary.write_text(sealed_json({"version": self.version, "size": self.size, "stretches": reached}))
        self._at_risk, self._noted = 0, time.monotonic()

    def _left_over(self) -> list[Stretch]:
        """Stretches of an earlier try, if they are of the same version and undamaged; else none."""
        found = _read_journal(self.target)
        if found is None and self.journal.exists():
            logger.warning("%s: damaged; the file is fetched from its beginning", self.journal)
        if not (self.version and found and (found.version, found.size) == (self.version, self.size)):
            return []
        for stretch in found.stretches:
            if not stretch.is_as_written(self.path):
                logger.warning("%s: damaged since it was written; these bytes are fetched again", self.path)
                stretch.rewind()
        return found.stretches

    @staticmethod
    def reached(target: Path) -> int:
        """The first byte that an earlier try did not bring, or the last one of all if it brought everything."""
        found = _read_journal(target)
        return min([s.next for s in found.stretches if not s.is_done] or [max(0, found.size - 1)]) if found else 0


class _Journal(NamedTuple):
    version: str | None
    size: int
    stretches: list[Stretch]


def _read_journal(target: Path) -> _Journal | None:
    """What is noted of an unfinished target, if the note is whole and the bytes are there."""
    try:
        found = read_json(journal_of(target))
        stretches = [Stretch(*numbers) for numbers in found["stretches"]]
        furthest = max(stretch.next if stretch.next > stretch.start else 0 for stretch in stretches)
        is_there = part_of(target).stat().st_size >= furthest
        return _Journal(found["version"], found["size"], stretches) if is_there else None
    except (OutputError, OSError, ValueError, KeyError, TypeError):
        return None


def clear_part(target: Path) -> None:
    """Remove what there is of an unfinished target, as far as possible; a journal alone is ignored."""
    journal = journal_of(target)
    for path in (temporary_path(journal), journal, part_of(target)):  # a journal must not outlive what it vouches for
        remove(path)


def part_of(target: Path) -> Path:
    """Where a file is until it is whole."""
    return target.with_name(f"{target.name}.part")


def journal_of(target: Path) -> Path:
    """Where it is noted how far it has come."""
    return target.with_name(f"{target.name}.part.json")


def _cut(size: int, connections: int) -> list[Stretch]:
    """Stretches of like size, not too small."""
    n = max(1, min(connections, size // LEAST_STRETCH))
    borders = [size * i // n for i in range(n + 1)]
    return [Stretch.between(start, stop) for start, stop in pairwise(borders)]


def may_pass(status: int) -> bool:
    """Whether an answer of that status may be another one next time."""
    return status in (408, 425, 429) or status >= 500


def _pause(seconds: float, ends: Sequence[threading.Event]) -> None:
    """Wait, unless one of the events is set."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not any(end.is_set() for end in ends):
        time.sleep(min(left, 0.1))


def _raise_if_any(ends: Sequence[threading.Event], name: str) -> None:
    if any(end.is_set() for end in ends):
        raise DownloadError(f"{name}: stopped")


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    longer_and_longer = tenacity.wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)
    jittered = (longer_and_longer + tenacity.wait_random(0, FIRST_WAIT))(state)
    return max(jittered, error.wait) if isinstance(error, InterruptedDownloadError) else jittered


def _check_bytes(path: Path, stat: Stat, name: str) -> None:
    """Compare size and checksum."""
    size = path.stat().st_size
    if size != stat.size:
        raise DamagedFileError(f"{name}: {size} bytes arrived instead of {stat.size}")
    if stat.checksum is not None and checksum(path, stat.checksum[0]) != stat.checksum[1]:
        raise DamagedFileError(f"{name}: what arrived has another {stat.checksum[0].upper()} checksum")


def checksum(path: Path, algorithm: str) -> str:
    """Of a file, in base64; `crc32` or what `hashlib` knows."""
    with path.open("rb") as file:
        if algorithm != "crc32":
            return base64.b64encode(hashlib.file_digest(file, algorithm).digest()).decode()
        value = 0
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def need_space(folder: Path, n_bytes: int) -> None:
    """Refuse to begin what cannot end."""
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    if free < n_bytes + BYTES_TO_SPARE:
        raise DownloadError(
            f"{folder}: {gigabytes(n_bytes + BYTES_TO_SPARE)} are needed, {gigabytes(free)} are free; make room, then "
            "run the same command again"
        )


def size_on_disk(target: Path) -> int:
    """Room that an unfinished `target` takes already."""
    part = part_of(target)
    return part.stat().st_blocks * 512 if part.exists() else 0


def gigabytes(n_bytes: float) -> str:
    """A size for people to read."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Say in one line that, and why, nothing can be written there."""
    kept = "what is there already is kept for the next try"
    try:
        yield
    except OSError as error:
        raise DownloadError(f"{path}: cannot be written: {error.strerror or error}; {kept}") from error
    except OutputError as error:
        raise DownloadError(f"{error}; {kept}") from error


def write_json(path: Path, values: object) -> None:
    """Write a small file that is whole whenever it is there."""
    with writing_to(path), atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other run is at work in the same place."""
    with writing_to(lock):
        make_folder(lock.parent)
        holder = filelock.FileLock(lock)
        try:
            holder.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("%s: another run is at work here; waiting for it", lock.parent)
            holder.acquire()
    try:
        yield
    finally:
        holder.release()
