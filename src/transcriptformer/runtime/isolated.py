"""Reading that may crash or never end, tried in a process of its own: HDF5 does both on some damaged files."""

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
from transcriptformer.runtime.signals import noting

SECONDS_TO_ANSWER = 600.0
"""Wall time after which the work is done in this process after all."""

SECONDS_PER_STEP = 2
"""Processor time after which a step counts as endless; each takes milliseconds. Waiting for a slow disk takes none."""


class CrashedError(Exception):
    """The process was ended by a signal."""


T = TypeVar("T")


def run_isolated(steps: Callable[[], Generator[None, None, T]], seconds_per_step: int = SECONDS_PER_STEP) -> T:
    """Exhaust `steps` in a fork of this process; on systems without a safe fork, in this one.

    Returns
    -------
    What `steps` return, pickled on its way.

    Raises
    ------
    TranscriptFormerError
        As `steps` raised it.
    RuntimeError
        With the message of any other error of `steps`.
    CrashedError
        If they brought the process down, or one of them did not end.
    """
    if not hasattr(os, "fork") or sys.platform == "darwin":
        return exhaust(steps())
    parent = os.getpid()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with warnings.catch_warnings(), noting():  # exceptions are lost in what Python calls at a fork
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, whose locks the child does not take
        child = os.fork()
        if child == 0:
            ours.close()  # so that an answer to a parent that is gone does not wait for it
            _answer(_with_limits(steps, seconds_per_step, parent), theirs)
    theirs.close()
    value: Any = None
    error: BaseException | None = None
    is_stuck = has_crashed = False
    try:
        is_stuck = not ours.poll(SECONDS_TO_ANSWER)
        if not is_stuck:
            value, error = ours.recv()
    except EOFError:
        has_crashed = True
    finally:
        ours.close()
        status = _end(child)
    if is_stuck:  # by a lock that another thread held when it was forked, or a very slow disk
        return exhaust(steps())
    if has_crashed:
        endless = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        raise CrashedError("reading it never ends" if endless else "reading it crashes HDF5")
    if error is not None:
        raise error
    return value


def _end(child: int) -> int:
    """End a process, which is over unless waiting for it was interrupted; its status, 0 where nobody knows it."""
    with suppress(ProcessLookupError, ChildProcessError):  # children are forgotten where SIGCHLD is ignored
        os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]
    return 0


def exhaust(steps: Generator[None, None, T]) -> T:
    """Run a generator to its end, for what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _answer(steps: Generator[None, None, Any], answer: Connection) -> NoReturn:
    """What the child does: never return into the code that it was forked from."""
    try:
        faulthandler.disable()  # the parent says what happened
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        answer.send((exhaust(steps), None))
    except TranscriptFormerError as error:
        answer.send((None, error))
    except BaseException as error:
        answer.send((None, RuntimeError(one_line(error))))
    finally:
        os._exit(0)


def _with_limits(
    steps: Callable[[], Generator[None, None, T]], seconds_per_step: int, parent: int
) -> Generator[None, None, T]:
    """Give each step its time, and take none when the parent is gone, which nobody would wait for."""
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
    import resource  # there is none on Windows

    used = sum(os.times()[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    deadline = int(used) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (deadline if hard == resource.RLIM_INFINITY else min(deadline, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
