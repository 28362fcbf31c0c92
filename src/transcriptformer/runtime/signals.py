"""SIGTERM and SIGHUP end a run like Ctrl-C does: by an exception in the main thread."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = frozenset(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a run; Python itself turns SIGINT into KeyboardInterrupt."""

RESUME = "the same command with --resume goes on"


class Ended(SystemExit):
    """Raised in the main thread of a process that a signal ends."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)


def raise_ended(signum: int, frame: FrameType | None) -> None:
    """Raise Ended: a signal handler."""
    raise Ended(signum)


@contextmanager
def handling(handler: Callable[[int, FrameType | None], object] = raise_ended) -> Iterator[None]:
    """Handle SIGTERM and SIGHUP; those that are ignored, as by nohup, stay ignored.

    In a thread other than the main one, nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        before = {signum: old for signum, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for signum in before:
            signal.signal(signum, handler)
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


@contextmanager
def noting() -> Iterator[Callable[[], None]]:
    """Note signals that would raise, and raise at the end, or when the function that is yielded is called.

    For calls of C code that takes no exception from what it calls back, or calls Python where exceptions are lost. To
    block signals would not do: another thread would receive them, and the main thread raise all the same.
    """
    noted: list[int] = []
    with ExitStack() as handlers:

        def let_out() -> None:
            while noted:
                before[noted[0]](noted.pop(0), None)

        before: dict[int, Callable[[int, FrameType | None], object]] = {}
        if threading.current_thread() is threading.main_thread():
            handlers.callback(let_out)
            for signum in (*SIGNALS, signal.SIGINT):
                handler = signal.getsignal(signum)
                if callable(handler):
                    before[signum] = handler
                    handlers.callback(signal.signal, signum, handler)
                    signal.signal(signum, lambda number, frame: noted.append(number))
        yield let_out


@contextmanager
def held_back() -> Iterator[None]:
    """Hold signals back in this thread, and in processes that it forks until they do otherwise."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def tell(error: BaseException, kept: str | None) -> None:
    """Say what is kept of a run that ends: with the one line that says it was ended, or in one of its own."""
    if kept is None:
        return
    if isinstance(error, KeyboardInterrupt | Ended):
        error.add_note(kept)
    else:
        logger.info("%s", kept)
