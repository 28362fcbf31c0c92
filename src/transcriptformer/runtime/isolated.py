"""Run code that may crash or hang in a child process; HDF5 does both on some damaged files."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

from transcriptformer.errors import TranscriptFormerError, one_line
from transcriptformer.runtime.signals import deferred_signals

TIMEOUT_SECONDS = 600.0
"""Wall time without an answer after which the work is done in this process instead."""

SECONDS_PER_STEP = 2
"""CPU time after which a step counts as hung; steps take milliseconds, and waiting for a disk takes no CPU time."""


CRASHES = tuple(
    getattr(signal, name)
    for name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL", "SIGSYS", "SIGXCPU")
    if hasattr(signal, name)
)
"""Signals that the code itself causes; others come from the system, such as SIGKILL if memory is short."""


class CrashedError(Exception):
    """The child process crashed, or one of its steps hung."""


T = TypeVar("T")


def run_isolated(steps: Callable[[], Generator[None, None, T]], seconds_per_step: int = SECONDS_PER_STEP) -> T:
    """Exhaust `steps` in a forked child; in this process where forking is unsafe.

    Returns
    -------
    The return value of `steps`; it must be picklable.

    Raises
    ------
    TranscriptFormerError
        If `steps` raised it, or the child was killed.
    MemoryError, OSError
        If `steps` raised it; an OSError only with the operating system's error number.
    RuntimeError
        If `steps` raised any other error, with its message.
    CrashedError
        If the child crashed, or a step hung.
    """
    if not hasattr(os, "fork") or sys.platform == "darwin":
        return exhaust(steps())
    parent = os.getpid()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with warnings.catch_warnings(), deferred_signals():  # exceptions in fork hooks are lost
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads; the child takes none of their locks
        child = os.fork()
        if child == 0:
            ours.close()  # otherwise sending could block when the parent is gone
            _answer(_with_limits(steps, seconds_per_step, parent), theirs)
    theirs.close()
    value: Any = None
    error: BaseException | None = None
    is_stuck = has_crashed = False
    try:
        is_stuck = not ours.poll(TIMEOUT_SECONDS)
        if not is_stuck:
            value, error = ours.recv()
    except EOFError:
        has_crashed = True
    finally:
        ours.close()
        status = _reap(child)
    if is_stuck:  # on a lock held by another thread at the fork, or on a very slow disk
        return exhaust(steps())
    if has_crashed:
        raise _death(status)
    if error is not None:
        raise error
    return value


def _death(status: int) -> Exception:
    """Return the error for a child that ended without an answer; a status of 0 is unknown."""
    signum = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if status and signum not in CRASHES:
        how = f"killed by {signal.Signals(signum).name}" if signum else "ended"
        return TranscriptFormerError(f"the process that reads a file was {how}; is there enough memory?")
    return CrashedError("reading it never ends" if signum == signal.SIGXCPU else "reading it crashes HDF5")


def _reap(child: int) -> int:
    """Kill a process if it still runs and return its wait status, or 0 if unknown."""
    with suppress(ProcessLookupError, ChildProcessError):  # children are not waitable if SIGCHLD is ignored
        os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]
    return 0


def exhaust(steps: Generator[None, None, T]) -> T:
    """Run a generator to its end and return its return value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _answer(steps: Generator[None, None, Any], answer: Connection) -> NoReturn:
    """Run `steps` in the child and send the result; never returns into the forked code."""
    try:
        faulthandler.disable()  # the parent reports crashes
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        answer.send((exhaust(steps), None))
    except TranscriptFormerError as error:
        answer.send((None, error))
    except MemoryError as error:
        answer.send((None, MemoryError(one_line(error))))
    except BaseException as error:
        errno = error.errno if isinstance(error, OSError) else None
        message = one_line(error)
        answer.send((None, RuntimeError(message) if errno is None else OSError(errno, message)))
    finally:
        os._exit(0)


def _with_limits(
    steps: Callable[[], Generator[None, None, T]], seconds_per_step: int, parent: int
) -> Generator[None, None, T]:
    """Limit the CPU time of each step, and exit if the parent is gone."""
    running = steps()
    while True:
        if os.getppid() != parent:
            os._exit(1)
        _extend_deadline(seconds_per_step)
        try:
            next(running)
        except StopIteration as end:
            return end.value
        yield


def _extend_deadline(seconds: int) -> None:
    import resource  # not on Windows

    used = sum(os.times()[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    deadline = int(used) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (deadline if hard == resource.RLIM_INFINITY else min(deadline, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
