"""Batches of proteins go to one process or several, each of which keeps what it computes as pieces on disk."""

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
from transcriptformer.runtime.parents import end_with
from transcriptformer.runtime.signals import RESUME, handling
from transcriptformer.storage.results import ROWS, Field, PieceWriter

EMBEDDINGS = "embeddings"

SECONDS_TO_END = 3.0
"""For a process to keep what it has and to end."""


class Batch(NamedTuple):
    """Sequences to embed, and the row of each in the results (proteins,)."""

    rows: np.ndarray
    sequences: list[str]


@dataclass(frozen=True)
class Job:
    """What every process of a run has to know.

    Attributes
    ----------
    model
        Folder of the model.
    layer, precision
        As for `Esm2`.
    pieces
        Folder of the results; it exists.
    run
        The run that they belong to.
    width
        Of an embedding.
    """

    model: Path
    layer: int
    precision: str
    pieces: Path
    run: str
    width: int

    @property
    def layout(self) -> dict[str, Field]:
        """Of the results."""
        return {EMBEDDINGS: Field("float32", self.width)}


def embed_batches(batches: Iterable[Batch], job: Job, device: torch.device, number: int = 0) -> Generator[int]:
    """Compute batches and keep them as pieces; yields the number of sequences after each.

    Parameters
    ----------
    number
        Of this process.
    """
    model = Esm2(job.model, job.layer, job.precision, device)
    writer = PieceWriter(job.pieces, number, job.layout, job.run)
    try:
        for batch in batches:
            writer.add({ROWS: batch.rows, EMBEDDINGS: model.residue_means(batch.sequences)})
            yield len(batch.rows)
    finally:  # also what was computed before something went wrong
        if writer.failure is None:
            writer.flush()


def share_batches(batches: Iterable[Batch], job: Job, devices: Sequence[torch.device]) -> Generator[int]:
    """The same by a process per device; each is given a batch when it is done with the one before.

    Raises
    ------
    TranscriptFormerError
        If one of them fails or is killed. What all of them have computed is kept.
    """
    waiting = iter(batches)
    with _processes(job, devices) as processes:
        busy = list(processes)
        for pipe in busy:
            _give(pipe, next(waiting, None))
        while busy:
            ready = multiprocessing.connection.wait(busy)
            for pipe in [pipe for pipe in busy if pipe in ready]:
                try:
                    answer = pipe.recv()
                except (EOFError, ConnectionResetError):
                    processes[pipe].join(SECONDS_TO_END)
                    code = processes[pipe].exitcode
                    raise TranscriptFormerError(
                        f"a process of this run has ended with exit code {code}, as if killed; {RESUME}"
                    ) from None
                if isinstance(answer, Exception):
                    raise answer
                if answer is None:
                    busy.remove(pipe)
                    continue
                yield answer
                _give(pipe, next(waiting, None))


def _give(pipe: Connection, batch: Batch | None) -> None:
    with suppress(OSError):  # the process is gone, which is noticed when its answer is waited for
        pipe.send(batch)


@contextmanager
def _processes(job: Job, devices: Sequence[torch.device]) -> Iterator[dict[Connection, SpawnProcess]]:
    """Processes that take batches until None comes; when they are left early, they keep what they have and end."""
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, SpawnProcess] = {}
    try:
        for number, device in enumerate(devices):
            ours, theirs = context.Pipe()
            args = (theirs, os.getpid(), job, device, number, len(devices))
            process = context.Process(target=_work, args=args, daemon=True)
            process.start()
            theirs.close()  # else the end of the process would not be noticed here
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
    """What such a process does; it ends with the main one, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends this one
    end_with(parent, patience=SECONDS_TO_END)  # so long it may take to notice that the pipe is closed
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // n_processes))
    answer = None
    try:
        with handling(), closing(embed_batches(_batches_from(pipe), job, device, number)) as embedded:
            for n_sequences in embedded:
                pipe.send(n_sequences)
    except Exception as error:
        answer = error
    with suppress(OSError):  # nobody may be there any more
        pipe.send(answer)


def _batches_from(pipe: Connection) -> Iterator[Batch]:
    """Until None comes, or the other end of the pipe is gone."""
    with suppress(EOFError):
        while (batch := pipe.recv()) is not None:
            yield batch
