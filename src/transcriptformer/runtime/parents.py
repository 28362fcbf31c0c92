"""Processes that end with the process that started them, however that ends."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import psutil

from transcriptformer.runtime.signals import RESUME

POLL_INTERVAL = 0.5
"""Seconds between looks at other processes."""

LAUNCHED_BY = "TRANSCRIPTFORMER_LAUNCHED_BY"
"""Environment variable: the process that launched this one to work beside it."""

_speaking = threading.Lock()


def is_launched() -> bool:
    """Whether another process of the same run launched this one; it leaves what is to be said to that process."""
    return LAUNCHED_BY in os.environ


def end_with_launcher() -> None:
    """End this process when the process that launched it is gone, if there is one."""
    if is_launched():
        is_speaker = os.environ.get("LOCAL_RANK") == "1"
        words = f"ERROR: the first process of this run was killed; {RESUME}" if is_speaker else ""
        end_with(int(os.environ[LAUNCHED_BY]), words)


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


def serve(parent: int, number: int = 0) -> None:
    """Let a data worker end with its parent, or when the parent says so, and on no signal to the whole group.

    The parent may need it to keep what is computed.

    Parameters
    ----------
    parent
        Process whose data worker this is.
    number
        Of the worker.
    """
    signal.set_wakeup_fd(-1)  # a fork shares that of its parent
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):  # macOS
        end_with(parent)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    is_gone = _watch(parent)

    def wait() -> None:
        while True:
            received = signal.sigtimedwait({signal.SIGTERM}, POLL_INTERVAL)
            if is_gone() or (received is not None and received.si_pid == parent):
                os._exit(0)

    threading.Thread(target=wait, name="serve-parent", daemon=True).start()


def exit_now(code: int, last_words: str = "") -> NoReturn:
    """End this process at once, from any thread; one thread gets to say why."""
    _speaking.acquire()
    if last_words:
        with suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"{last_words}\n".encode())
    os._exit(code)


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
