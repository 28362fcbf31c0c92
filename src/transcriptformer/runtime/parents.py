"""Processes that end with the process that started them, however that ends."""

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
"""Seconds between looks at other processes."""

LAUNCHED_BY = "TRANSCRIPTFORMER_LAUNCHED_BY"
"""Environment variable: the process that launched this one to work beside it."""

FIRST_KILLED = f"ERROR: the first process of this run was killed; {RESUME}"

workers: set[BaseProcess] = set()
"""Data workers without which this process cannot go on."""

_speaking = threading.Lock()


def is_launched() -> bool:
    """Whether another process of the same run launched this one; it leaves what is to be said to that process."""
    return LAUNCHED_BY in os.environ


def end_with_launcher() -> None:
    """End this process when the process that launched it is gone, if there is one."""
    if is_launched():
        is_speaker = os.environ.get("LOCAL_RANK") == "1"
        end_with(int(os.environ[LAUNCHED_BY]), FIRST_KILLED if is_speaker else "")


def end_with(parent: int, last_words: str = "", patience: float = 0.0) -> None:
    """End this process within a second of its parent, whatever the main thread is doing.

    Parameters
    ----------
    parent
        A process.
    last_words
        To say then.
    patience
        Seconds that the main thread has to end by itself.
    """
    is_gone = _watch(parent)

    def wait() -> None:
        while not is_gone():
            time.sleep(POLL_INTERVAL)
        time.sleep(patience)
        exit_now(1, last_words)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def serve(parent: int, started: Semaphore, number: int) -> None:
    """Let a data worker end with its parent, or when the parent says so, and on no signal to the whole group.

    The parent may need it to keep what is computed. It was forked with signals held back.

    Parameters
    ----------
    parent
        Process whose data worker this is.
    started
        Is released when this is done.
    number
        Of the worker.
    """
    signal.set_wakeup_fd(-1)  # a fork shares that of its parent
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
        _wait_for(parent)
    else:  # macOS
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        end_with(parent)
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


def dismiss(worker: BaseProcess) -> None:
    """Kill a data worker that is not needed."""
    workers.discard(worker)
    worker.kill()
    worker.join()


def lost_worker(pid: object, how: str = "killed") -> str:
    """What to say of a data worker that was ended."""
    return f"a data worker (process {pid}) was {how}; fewer --n-data-workers take less memory; {RESUME}"


def exit_now(code: int, last_words: str = "") -> NoReturn:
    """End this process at once, from any thread; one thread gets to say why."""
    _speaking.acquire()
    say(last_words)
    os._exit(code)


def say(words: str) -> None:
    """Write a line, if any, to stderr from any thread."""
    if words:
        with suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"{words}\n".encode())


def _watch(parent: int) -> Callable[[], bool]:
    """Return a function that says whether the parent is gone."""
    if os.getppid() == parent:
        return lambda: os.getppid() != parent

    def is_gone() -> bool:  # the parent is gone already, or had a server process fork this one
        try:
            return psutil.Process(parent).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return is_gone
