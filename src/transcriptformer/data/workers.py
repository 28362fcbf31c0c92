"""Data workers that start for certain, and end with the process that they read for."""

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
from transcriptformer.runtime.parents import POLL_INTERVAL, dismiss, serve, workers
from transcriptformer.runtime.signals import held_back, noting

T = TypeVar("T")

logger = logging.getLogger(__name__)

TIME_TO_START = 10.0
"""Seconds for all workers to start; twice as many at each further attempt."""

MOST_STARTS = 4
"""Attempts to start them."""


def start_workers(loader: "DataLoader[T]") -> Iterator[T]:
    """Iterate over what a DataLoader reads; its workers start here.

    A fork may hang for ever in an interpreter with other threads (in Python 3.11, when one of PyTorch's asks for the
    interpreter at that moment): workers that do not start are replaced. Whoever asks for the next item is told when a
    worker has been killed; PyTorch would also raise that in the main thread, wherever it is.

    Raises
    ------
    TranscriptFormerError
        If workers do not start.
    """
    if loader.num_workers == 0:
        return iter(loader)
    for seconds in (TIME_TO_START * 2**attempt for attempt in range(MOST_STARTS)):
        started, forked = multiprocessing.Semaphore(0), list[BaseProcess]()
        loader.worker_init_fn = partial(serve, os.getpid(), started)
        loader.multiprocessing_context = _recording(forked)
        items = _fork(loader)
        if _have_started(forked, started, seconds):
            return items
        logger.warning("data workers did not start within %.0f s; starting others", seconds)
        for worker in forked:
            dismiss(worker)
    raise TranscriptFormerError("data workers do not start; try again with --n-data-workers 0")


def shard_of_worker(process: int, n_processes: int) -> tuple[int, int]:
    """Which share of the data this worker serves, and how many shares there are.

    Parameters
    ----------
    process, n_processes
        Process of the run that it reads for, and how many there are.
    """
    worker = get_worker_info()
    number, n_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
    return process * n_workers + number, n_processes * n_workers


def _recording(processes: list[BaseProcess]) -> BaseContext:
    """Return a context whose processes are added to a list, and watched, before they start."""
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
    """Wait for workers to start; not for one that has ended, which is for the watchdog and for who reads to notice."""
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
    with held_back(), noting():  # exceptions are lost in what Python calls at a fork
        try:
            return iter(loader)
        finally:
            signal.signal(signal.SIGCHLD, before)
