"""Running functions that may crash or hang in forked processes with all imports preloaded."""

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
"""Limit on the address space, because damaged files may declare any size."""


class Outcome(NamedTuple):
    """Return value of a function, or a description of its failure: a hang, a crash or a traceback."""

    value: Any = None
    failure: str = ""


SERVER = multiprocessing.get_context("forkserver")
"""Context that forks from a single-threaded server, because forks of a multi-threaded process may deadlock."""

SERVER.set_forkserver_preload(["transcriptformer.inference.run", "tests.test_mutated_files"])


def run_forked(function: Callable[[], Any], seconds: float) -> Outcome:
    """Call a picklable function in a separate process, limited to `seconds` of CPU time.

    CPU time does not depend on the load of the machine; real time is limited to ten times as much.
    """
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_call, args=(function, sender, round(seconds)))
    process.start()
    sender.close()
    try:
        if not receiver.poll(10 * seconds):
            return Outcome(failure=f"timed out after {10 * seconds} s")
        return Outcome(*receiver.recv())
    except EOFError:
        return Outcome(failure=f"crashed, or exceeded {seconds} s of CPU time")
    finally:
        receiver.close()
        process.kill()
        process.join()


def _call(function: Callable[[], Any], sender: Any, seconds: int) -> NoReturn:
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.resetwarnings()
    warnings.simplefilter("ignore")  # pytest turns them into errors, which users do not see
    with tempfile.TemporaryFile() as sink:  # discard the output of libraries
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    try:
        sender.send((function(), ""))
    except BaseException:
        sender.send((None, traceback.format_exc()))
    finally:
        os._exit(0)
