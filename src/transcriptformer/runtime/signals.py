"""Signal handling: SIGTERM and SIGHUP raise an exception in the main thread, like Ctrl-C."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = frozenset(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a run, besides SIGINT, which Python turns into KeyboardInterrupt."""

RESUME = "rerun the same command with --resume to continue"


class TerminatedError(SystemExit):
    """Raised in the main thread when a signal ends the process."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)


def raise_terminated(signum: int, frame: FrameType | None) -> None:
    """Signal handler that raises TerminatedError."""
    raise TerminatedError(signum)


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], object] = raise_terminated) -> Iterator[None]:
    """Install a handler for SIGTERM and SIGHUP; ignored signals stay ignored, as under nohup.

    Outside the main thread, this has no effect.
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
def deferred_signals() -> Iterator[Callable[[], None]]:
    """Defer signal handlers until the end of the block, or until the yielded function is called.

    Use it around C code whose callbacks must not raise, or swallow exceptions. Blocking signals would not help:
    another thread would receive them, and Python would still raise in the main thread.
    """
    deferred: list[int] = []
    with ExitStack() as handlers:

        def run_deferred() -> None:
            while deferred:
                before[deferred[0]](deferred.pop(0), None)

        before: dict[int, Callable[[int, FrameType | None], object]] = {}
        if threading.current_thread() is threading.main_thread():
            handlers.callback(run_deferred)
            for signum in (*SIGNALS, signal.SIGINT):
                handler = signal.getsignal(signum)
                if callable(handler):
                    before[signum] = handler
                    handlers.callback(signal.signal, signum, handler)
                    signal.signal(signum, lambda number, frame: deferred.append(number))
        yield run_deferred


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Block signals in this thread, and in processes forked from it until they unblock them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def report_kept(error: BaseException, kept: str | None) -> None:
    """Report what an ending run has kept: as a note of the error if a signal ended it, otherwise in the log."""
    if kept is None:
        return
    if isinstance(error, KeyboardInterrupt | TerminatedError):
        error.add_note(kept)
    else:
        logger.info("%s", kept)
