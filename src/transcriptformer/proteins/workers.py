"""Embed batches of proteins in one or several processes, each of which writes its results to disk as pieces."""

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from transcriptformer.errors import TranscriptFormerError
from transcriptformer.proteins.esm2 import Esm2
from transcriptformer.runtime.parents import exit_with_parent
from transcriptformer.runtime.signals import RESUME, handle_signals
from transcriptformer.storage.results import ROWS, Field, PieceWriter

EMBEDDINGS = "embeddings"

SECONDS_TO_END = 3.0
"""Time for a process to write its results and exit."""


class Batch(NamedTuple):
    """Sequences to embed, and their rows in the results (proteins,)."""

    rows: np.ndarray
    sequences: list[str]


@dataclass(frozen=True)
class Job:
    """Settings shared by all processes of a run.

    Attributes
    ----------
    model
        Folder of the model.
    layer, precision
        As for `Esm2`.
    pieces
        Existing folder of the results.
    run
        Id of the run.
    width
        Width of an embedding.
    """

    model: Path
    layer: int
    precision: str
    pieces: Path
    run: str
    width: int

    @property
    def layout(self) -> dict[str, Field]:
        """Fields of the results."""
        return {EMBEDDINGS: Field("float32", self.width)}


def embed_batches(batches: Iterable[Batch], job: Job, device: torch.device, number: int = 0) -> Generator[int]:
    """Embed batches and write the results as pieces; yield the number of sequences of each batch.

    Parameters
    ----------
    number
        Index of this process.
    """
    model = Esm2(job.model, job.layer, job.precision, device)
    writer = PieceWriter(job.pieces, number, job.layout, job.run)
    try:
        for batch in batches:
            writer.add({ROWS: batch.rows, EMBEDDINGS: model.residue_means(batch.sequences)})
            yield len(batch.rows)
    finally:  # after an error, keep what was computed before it
        if writer.failure is None:
            writer.flush()


def share_batches(batches: Iterable[Batch], job: Job, devices: Sequence[torch.device]) -> Generator[int]:
    """Do the same as `embed_batches` with one process per device, each of which gets a new batch when it is idle.

    Raises
    ------
    TranscriptFormerError
        If a process fails or is killed; results computed so far are kept.
    """
    waiting = iter(batches)
    with _processes(job, devices) as processes:
        busy = list(processes)
        for pipe in busy:
            _send(pipe, next(waiting, None))
        while busy:
            ready = multiprocessing.connection.wait(busy)
            for pipe in [pipe for pipe in busy if pipe in ready]:
                try:
                    answer = pipe.recv()
                except (EOFError, ConnectionResetError):
                    processes[pipe].join(SECONDS_TO_END)
                    code = processes[pipe].exitcode
                    raise TranscriptFormerError(
                        f"a worker process was killed or crashed (exit code {code}); {RESUME}"
                    ) from None
                if isinstance(answer, Exception):
                    raise answer
                if answer is None:
                    busy.remove(pipe)
                    continue
                yield answer
                _send(pipe, next(waiting, None))


def _send(pipe: Connection, batch: Batch | None) -> None:
    with suppress(OSError):  # the process is gone; waiting for its answer reports that
        pipe.send(batch)


@contextmanager
def _processes(job: Job, devices: Sequence[torch.device]) -> Iterator[dict[Connection, SpawnProcess]]:
    """Start processes that embed batches until they receive None; on early exit, they write their results and end."""
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, SpawnProcess] = {}
    try:
        for number, device in enumerate(devices):
            ours, theirs = context.Pipe()
            args = (theirs, os.getpid(), job, device, number, len(devices))
            process = context.Process(target=_work, args=args, daemon=True)
            process.start()
            theirs.close()  # otherwise the pipe would stay open when the process ends
            processes[ours] = process
        yield processes
    finally:
        for pipe in processes:
            pipe.close()
        for process in processes.values():
            process.terminate()
        until = time.monotonic() + SECONDS_TO_END
        for process in processes.values():
            process.join(max(0.0, until - time.monotonic()))
            process.kill()


def _work(pipe: Connection, parent: int, job: Job, device: torch.device, number: int, n_processes: int) -> None:
    """Run a worker process, which ends when the main process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C and ends this one
    exit_with_parent(parent, grace_seconds=SECONDS_TO_END)  # time to notice that the pipe is closed
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // n_processes))
    answer = None
    try:
        with handle_signals(), closing(embed_batches(_batches_from(pipe), job, device, number)) as embedded:
            for n_sequences in embedded:
                pipe.send(n_sequences)
    except Exception as error:
        answer = error
    with suppress(OSError):  # the main process may be gone
        pipe.send(answer)


def _batches_from(pipe: Connection) -> Iterator[Batch]:
    """Yield batches until None arrives or the other end of the pipe closes."""
    with suppress(EOFError):
        while (batch := pipe.recv()) is not None:
            yield batch
