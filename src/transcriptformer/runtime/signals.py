"""Signal handling: SIGTERM and SIGHUP raise an exception in the main thread, like Ctrl-C."""

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = frozenset(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a run, besides SIGINT, which Python turns into KeyboardInterrupt."""

RESUME = "rerun the same command with --resume to continue"

_SECONDS_TO_REPEAT = 0.05
"""Delay of a repeated signal, by which Python has left the code that swallowed the exception."""


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


def interrupt_main_thread(signum: int = signal.SIGTERM) -> None:
    """Send a signal to the main thread, from any thread."""
    main = threading.main_thread().ident
    if main is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main, signum)


@contextmanager
def repeated_if_swallowed() -> Iterator[None]:
    """Send a signal again if its exception was raised where Python swallows exceptions, such as in `__del__`.

    Python would print a traceback, and the run would go on.
    """
    before = sys.unraisablehook

    def repeat(swallowed: "sys.UnraisableHookArgs") -> None:
        error = swallowed.exc_value
        signum = getattr(error, "signal", signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)
        if signum is None:
            before(swallowed)
        else:
            threading.Timer(_SECONDS_TO_REPEAT, interrupt_main_thread, [signum]).start()

    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = before


class DeferredSignals:
    """Signals whose handlers wait until `run` is called.

    Outside the main thread, which alone runs handlers, this has no effect.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._handlers: dict[int, Callable[[int, FrameType | None], object]] = {}

    def defer(self) -> None:
        """Replace the handlers by ones that only record the signal."""
        if threading.current_thread() is threading.main_thread():
            for signum in (*SIGNALS, signal.SIGINT):
                handler = signal.getsignal(signum)
                if callable(handler):
                    self._handlers[signum] = handler
                    signal.signal(signum, lambda number, frame: self._received.append(number))

    def restore(self) -> None:
        """Reinstall the handlers."""
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def run(self) -> None:
        """Run the handlers of the signals received so far."""
        while self._received:
            number = self._received.pop(0)
            self._handlers[number](number, None)

    @contextmanager
    def undeferred(self) -> Iterator[None]:
        """Run handlers at once within the block."""
        self.restore()
        try:
            self.run()
            yield
        finally:
            self.defer()


@contextmanager
def deferred_signals() -> Iterator[DeferredSignals]:
    """Defer signal handlers until the end of the block.

    Use it around C code whose callbacks must not raise, or swallow exceptions. Blocking signals would not help:
    another thread would receive them, and Python would still raise in the main thread.
    """
    signals = DeferredSignals()
    try:
        signals.defer()
        yield signals
    finally:
        signals.restore()
        signals.run()


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
    """Report what an interrupted run has kept: as a note of the error if a signal ended it, otherwise in the log."""
    if kept is None:
        return
    if isinstance(error, KeyboardInterrupt | TerminatedError):
        error.add_note(kept)
    else:
        logger.info("%s", kept)
