"""End processes together with the process that started them."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Semaphore
from typing import NoReturn

import psutil

from transcriptformer.runtime.signals import RESUME

POLL_INTERVAL = 0.5
"""Seconds between checks of other processes."""

LAUNCHED_BY = "TRANSCRIPTFORMER_LAUNCHED_BY"
"""Environment variable with the id of the process that launched this one."""

FIRST_KILLED = f"ERROR: the first process of this run was killed; {RESUME}"

workers: set[BaseProcess] = set()
"""Data workers that this process depends on."""

_exiting = threading.Lock()


def is_launched() -> bool:
    """Whether another process of the same run launched this one, and reports for it."""
    return LAUNCHED_BY in os.environ


def exit_with_launcher() -> None:
    """End this process when its launcher is gone, if it has one."""
    if is_launched():
        is_reporter = os.environ.get("LOCAL_RANK") == "1"
        exit_with_parent(int(os.environ[LAUNCHED_BY]), FIRST_KILLED if is_reporter else "")


def exit_with_parent(parent: int, message: str = "", grace_seconds: float = 0.0) -> None:
    """End this process within a second of its parent, whatever the main thread is doing.

    Parameters
    ----------
    parent
        Process id.
    message
        Written to stderr on exit.
    grace_seconds
        Time for the main thread to exit by itself.
    """
    is_gone = _watch(parent)

    def wait() -> None:
        while not is_gone():
            time.sleep(POLL_INTERVAL)
        time.sleep(grace_seconds)
        exit_now(1, message)

    threading.Thread(target=wait, name="exit-with-parent", daemon=True).start()


def serve_parent(parent: int, started: Semaphore, number: int) -> None:
    """Make a data worker end only with its parent or on the parent's SIGTERM, not on signals to the process group.

    The parent may need its workers to save results. Workers are forked with signals blocked.

    Parameters
    ----------
    parent
        Process id of the parent.
    started
        Released once the worker is set up.
    number
        Number of the worker.
    """
    signal.set_wakeup_fd(-1)  # inherited from the parent
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
        _wait_for(parent)
    else:  # macOS
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        exit_with_parent(parent)
    started.release()


def _wait_for(parent: int) -> None:
    """End this process when its parent is gone, or sends SIGTERM."""
    is_gone = _watch(parent)

    def wait() -> None:
        while True:
            received = signal.sigtimedwait({signal.SIGTERM}, POLL_INTERVAL)
            if is_gone() or (received is not None and received.si_pid == parent):
                os._exit(0)

    threading.Thread(target=wait, name="serve-parent", daemon=True).start()


def kill_worker(worker: BaseProcess) -> None:
    """Kill a data worker that is no longer needed."""
    workers.discard(worker)
    if worker.pid is None:  # it never started
        return
    worker.kill()
    worker.join()


def lost_worker_message(pid: object, how: str = "killed") -> str:
    """Error message for a killed data worker."""
    return f"a data worker (process {pid}) was {how}; reduce --n-data-workers to save memory; {RESUME}"


def exit_now(code: int, message: str = "") -> NoReturn:
    """End this process immediately, from any thread; only the first caller writes its message."""
    _exiting.acquire()
    write_stderr(message)
    os._exit(code)


def write_stderr(message: str) -> None:
    """Write a line to stderr from any thread; do nothing if it is empty."""
    if message:
        with suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"{message}\n".encode())


def _watch(parent: int) -> Callable[[], bool]:
    """Return a function that checks whether the parent is gone."""
    if os.getppid() == parent:
        return lambda: os.getppid() != parent

    def is_gone() -> bool:  # the parent is already gone, or this process was forked by a server process
        try:
            return psutil.Process(parent).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return is_gone
