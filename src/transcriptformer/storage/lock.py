"""A lock that keeps a second run out of a folder and names the first one."""

import errno
import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import filelock
import psutil

from transcriptformer.errors import UsageError
from transcriptformer.storage.atomic import writing

logger = logging.getLogger(__name__)

PATIENCE = 15.0
"""Seconds to wait for the processes of a killed run, which notice its end within some seconds."""


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""Errors of file systems without locks."""


class RunLock:
    """A lock file that names the process that holds it; it goes when the run ends, however it ends.

    Parameters
    ----------
    path
        The lock file; it must lie where the run does not delete it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, filelock.FileLock(path, fallback_to_soft=False)

    def acquire(self, place: Path) -> None:
        """Keep other runs out of `place` until `release`, or until this process ends.

        Raises
        ------
        UsageError
            If another run is at work there; it says which.
        OutputError
            If the lock file cannot be written.
        """
        with writing(self.path):
            try:
                self._acquire(place)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                logger.warning("%s: files cannot be locked here; do not start a second run of the same", place)
                return
        with suppress(OSError):
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            self.path.write_text(json.dumps(holder), encoding="utf-8")

    def release(self) -> None:
        """Release the lock and delete its file."""
        if self._lock.is_locked:
            with suppress(OSError):  # Windows deletes no open file
                self.path.unlink(missing_ok=True)  # while it is held: whoever gets a lock on it then tries again
            self._lock.release()

    def _acquire(self, place: Path) -> None:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                self._lock.acquire(timeout=0)
                return
            except filelock.Timeout:
                holder = self._holder()
                if _is_alive(holder) or time.monotonic() > until:
                    raise UsageError(
                        f"{place}: another run is at work there{_described(holder)}; wait until it is done"
                    ) from None
            time.sleep(0.2)

    def _holder(self) -> dict[str, object]:
        """What the process that holds the lock says of itself, if it has come to that."""
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}


def _is_alive(holder: dict[str, object]) -> bool:
    """Whether the process that took the lock is there, as far as can be told; it may have left processes behind."""
    if holder.get("host") != socket.gethostname():
        return bool(holder)
    pid = holder.get("pid")
    return isinstance(pid, int) and psutil.pid_exists(pid)


def _described(holder: dict[str, object]) -> str:
    if not {"pid", "host", "since"} <= holder.keys():
        return ""
    return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
