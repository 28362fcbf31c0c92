"""Reading that may crash or never end, tried in a process of its own: HDF5 does both on some damaged files."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import NoReturn

from transcriptformer.errors import TranscriptFormerError, one_line

SECONDS_PER_STEP = 2
"""Processor time after which a step counts as endless; each takes milliseconds. Waiting for a slow disk takes none."""


class CrashedError(Exception):
    """The process was ended by a signal."""


def run_isolated(steps: Callable[[], Iterable[None]]) -> None:
    """Exhaust `steps` in a fork of this process; on systems without a safe fork, in this one.

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
        for _ in steps():
            pass
        return
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, whose locks the child does not take
        child = os.fork()
    if child == 0:
        _exhaust(steps, theirs)
    theirs.close()
    try:
        error = ours.recv()
    except EOFError:
        error = CrashedError
    finally:
        ours.close()
        os.kill(child, signal.SIGKILL)  # which is over, unless waiting for it was interrupted
        _, status = os.waitpid(child, 0)
    if error is CrashedError:
        endless = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        raise CrashedError("reading it never ends" if endless else "reading it crashes HDF5")
    if error is not None:
        raise error


def _exhaust(steps: Callable[[], Iterable[None]], answer: Connection) -> NoReturn:
    """What the child does: never return into the code that it was forked from."""
    try:
        faulthandler.disable()  # the parent says what happened
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _extend_deadline()
        for _ in steps():
            _extend_deadline()
        answer.send(None)
    except TranscriptFormerError as error:
        answer.send(error)
    except BaseException as error:
        answer.send(RuntimeError(one_line(error)))
    finally:
        os._exit(0)


def _extend_deadline() -> None:
    import resource  # there is none on Windows

    used = sum(os.times()[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    deadline = int(used) + 1 + SECONDS_PER_STEP
    resource.setrlimit(resource.RLIMIT_CPU, (deadline if hard == resource.RLIM_INFINITY else min(deadline, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
