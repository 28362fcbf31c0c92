"""Data workers that start reliably and exit with their parent process."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from copy import copy
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Semaphore
from typing import Any, TypeVar

from torch.utils.data import DataLoader, get_worker_info

from transcriptformer.errors import TranscriptFormerError
from transcriptformer.runtime.parents import POLL_INTERVAL, kill_worker, serve_parent, workers
from transcriptformer.runtime.signals import blocked_signals, deferred_signals

T = TypeVar("T")

logger = logging.getLogger(__name__)

START_TIMEOUT = 10.0
"""Seconds to wait for all workers to start; doubled at each attempt."""

MAX_ATTEMPTS = 4
"""Maximum number of attempts to start workers."""


def start_workers(loader: "DataLoader[T]") -> Iterator[T]:
    """Start the workers of a DataLoader and return its iterator.

    Forking a multi-threaded process may hang (in Python 3.11, if a PyTorch thread requests the GIL at that moment), so
    workers that do not start are replaced. A killed worker is reported when the next item is requested; PyTorch's
    handler would also raise in the main thread, at any point.

    Raises
    ------
    TranscriptFormerError
        If workers do not start.
    """
    if loader.num_workers == 0:
        return iter(loader)
    for seconds in (START_TIMEOUT * 2**attempt for attempt in range(MAX_ATTEMPTS)):
        started, forked = multiprocessing.Semaphore(0), list[BaseProcess]()
        loader.worker_init_fn = partial(serve_parent, os.getpid(), started)
        loader.multiprocessing_context = _recording(forked)
        items = _fork(loader)
        if _have_started(forked, started, seconds):
            return items
        logger.warning("data workers did not start within %.0f s; replacing them", seconds)
        for worker in forked:
            kill_worker(worker)
    raise TranscriptFormerError("data workers cannot be started; try again with --n-data-workers 0")


def shard_of_worker(process: int, n_processes: int) -> tuple[int, int]:
    """Return the index of this worker's shard of the data, and the number of shards.

    Parameters
    ----------
    process, n_processes
        Rank of the process that the worker reads for, and number of processes.
    """
    worker = get_worker_info()
    number, n_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
    return process * n_workers + number, n_processes * n_workers


def _recording(processes: list[BaseProcess]) -> BaseContext:
    """Return a context that adds its processes to `processes` and to the watched workers before they start."""
    context = copy(multiprocessing.get_context())
    make = context.Process

    def record(*args: Any, **options: Any) -> BaseProcess:
        process = make(*args, **options)
        processes.append(process)
        workers.add(process)
        return process

    context.Process = record  # type: ignore[assignment, misc]
    return context


def _have_started(forked: list[BaseProcess], started: Semaphore, seconds: float) -> bool:
    """Wait for workers to start; a worker that has exited is left to the watchdog and the consumer."""
    until = time.monotonic() + seconds
    for _ in forked:
        while not started.acquire(timeout=POLL_INTERVAL):
            if any(worker.exitcode not in (None, 0) for worker in forked):
                return True
            if time.monotonic() > until:
                return False
    return True


def _fork(loader: "DataLoader[T]") -> Iterator[T]:
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    with blocked_signals(), deferred_signals():  # exceptions in fork hooks are lost
        try:
            return iter(loader)
        finally:
            signal.signal(signal.SIGCHLD, before)
