"""Functions that may crash or hang, each in a fork of a process that has everything imported already."""

import faulthandler
import multiprocessing
import os
import resource
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

ADDRESS_SPACE = 16 * 2**30
"""A damaged file may declare any size; it fails here before the machine does."""


class Outcome(NamedTuple):
    """What a function returned, or how else it ended: hung, by a signal, or with a traceback."""

    value: Any = None
    trouble: str = ""


SERVER = multiprocessing.get_context("forkserver")
"""A process without threads to fork from: a fork of this one might wait for ever for threads that it does not have."""

SERVER.set_forkserver_preload(["transcriptformer.inference.run", "tests.test_mutated_files"])


def run_forked(function: Callable[[], Any], seconds: float) -> Outcome:
    """Call a function, which is pickled, in a process of its own, for so many seconds at most.

    The seconds are of the processor, so that a busy machine makes no difference; who waits gets some more.
    """
    ours, theirs = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_call, args=(function, theirs, round(seconds)))
    process.start()
    theirs.close()
    try:
        if not ours.poll(10 * seconds):
            return Outcome(trouble=f"no end after {10 * seconds} s")
        return Outcome(*ours.recv())
    except EOFError:
        return Outcome(trouble=f"crashed, or no end after {seconds} s")
    finally:
        ours.close()
        process.kill()
        process.join()


def _call(function: Callable[[], Any], answer: Any, seconds: int) -> NoReturn:
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.resetwarnings()
    warnings.simplefilter("ignore")  # as errors, they would hide what a user sees
    with tempfile.TemporaryFile() as sink:  # for what libraries print
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    try:
        answer.send((function(), ""))
    except BaseException:
        answer.send((None, traceback.format_exc()))
    finally:
        os._exit(0)
