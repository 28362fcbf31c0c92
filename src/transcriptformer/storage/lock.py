"""Lock that keeps concurrent runs out of a folder, and names the run that holds it."""

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import filelock
import psutil

from transcriptformer.errors import UsageError
from transcriptformer.storage.atomic import writing

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 15.0
"""Seconds to wait for the remaining processes of a killed run to exit."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""Errors of file systems that do not support locks."""


class RunLock:
    """Lock file that names the process holding it; the operating system releases it when the process ends.

    Parameters
    ----------
    path
        The lock file, outside folders that the run deletes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, filelock.FileLock(path, fallback_to_soft=False)

    def acquire(self, place: Path) -> None:
        """Lock `place` until `release`, or until this process ends.

        Raises
        ------
        UsageError
            If another run holds the lock; the message names it.
        OutputError
            If the lock file cannot be written.
        """
        self._hold(place, self._refuse_other)

    def wait(self, place: Path) -> None:
        """Lock `place` as `acquire` does, but wait for another run to finish.

        Raises
        ------
        OutputError
            If the lock file cannot be written.
        """
        self._hold(place, self._await_other)

    def release(self) -> None:
        """Release the lock and delete its file."""
        if self._lock.is_locked:
            with suppress(OSError):  # Windows deletes no open file
                self.path.unlink(missing_ok=True)  # before the release: filelock retries if its file was deleted
            self._lock.release()

    def _hold(self, place: Path, take: Callable[[Path], None]) -> None:
        with writing(self.path):
            try:
                take(place)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                logger.warning("%s: the file system does not support locks; do not start the same run twice", place)
                return
        with suppress(OSError):
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            self.path.write_text(json.dumps(holder), encoding="utf-8")

    def _refuse_other(self, place: Path) -> None:
        until = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                self._lock.acquire(timeout=0)
                return
            except filelock.Timeout:
                holder = self._holder()
                if _is_alive(holder) or time.monotonic() > until:
                    raise UsageError(
                        f"{place}: in use by another run{_describe(holder)}; wait for it to finish"
                    ) from None
            time.sleep(0.2)

    def _await_other(self, place: Path) -> None:
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("%s: in use by another run%s; waiting for it to finish", place, _describe(self._holder()))
            self._lock.acquire()

    def _holder(self) -> dict[str, object]:
        """Read the description of the process that holds the lock; empty if not yet written."""
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}


def _is_alive(holder: dict[str, object]) -> bool:
    """Whether the process that took the lock is alive; assumed on other hosts. Its children may outlive it."""
    if holder.get("host") != socket.gethostname():
        return bool(holder)
    pid = holder.get("pid")
    return isinstance(pid, int) and psutil.pid_exists(pid)


def _describe(holder: dict[str, object]) -> str:
    if not {"pid", "host", "since"} <= holder.keys():
        return ""
    return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
