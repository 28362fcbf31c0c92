"""Predictions leave the Trainer: into memory, or into parts on disk."""

import logging
import signal
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

import numpy as np
import pytorch_lightning as pl
import torch

from transcriptformer.config import InferenceConfig
from transcriptformer.errors import TranscriptFormerError
from transcriptformer.inference.module import Prediction
from transcriptformer.runtime.signals import Ended
from transcriptformer.runtime.watchdog import Watchdog
from transcriptformer.storage.results import LABEL, LABEL_PROBABILITY, N_GENES, ROWS, Field, Layout

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""Called with how many cells are done and how many there are."""

BATCHES_WAITING = 2
"""Batches whose results may be on their way while the next one is computed."""


def layout_of(inference: InferenceConfig, width: int, with_labels: bool = False) -> Layout:
    """The results that are wanted, for embeddings of that width, and whether labels are told (from those of cells)."""
    layout: dict[str, Field] = {}
    if "embeddings" in inference.output_keys and inference.emb_type == "cell":
        layout["embeddings"] = Field("float32", width)
    elif "embeddings" in inference.output_keys:
        layout[N_GENES] = Field("int32")
        layout["genes"] = Field("int32", per_gene=True)
        layout["cge_embeddings"] = Field("float32", width, per_gene=True)
    if "llh" in inference.output_keys:
        layout["llh"] = Field("float32")
    if with_labels and "embeddings" in layout:
        layout |= {LABEL: Field("int32"), LABEL_PROBABILITY: Field("float32")}
    return layout


VECTORS = ("embeddings", "llh", LABEL_PROBABILITY, "cge_embeddings")
"""Results that are numbers of the model, which has to be able to compute them."""


def check_finite(values: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> None:
    """Raise TranscriptFormerError where results are NaN or infinite.

    Parameters
    ----------
    values
        Results by name; an entry of the first axis each.
    rows
        The row of the result that each entry belongs to.
    """
    for name, array in values.items():
        # The extremes are quick to find, and NaN if one entry is.
        if array.size == 0 or np.isfinite([array.min(), array.max()]).all():
            continue
        is_bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
        bad = np.unique(rows[name][is_bad])
        some = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        raise TranscriptFormerError(
            f"{name.removeprefix('cge_')} of {len(bad)} cells of a batch are NaN or infinite (rows {some} of the "
            "result): weights or counts are too large for this precision; --precision 32 reaches furthest"
        )


class Recorder(Protocol):
    """Takes results batch by batch, by name of the field."""

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Take the results of a batch."""
        ...

    def flush(self) -> None:
        """See to it that nothing of them can be lost."""
        ...


class MemoryRecorder:
    """Keeps results of `n_cells` cells in memory; reads like `transcriptformer.storage.results.Pieces`."""

    def __init__(self, layout: Layout, n_cells: int) -> None:
        self.layout = layout
        self.cells = {
            name: np.empty((n_cells, *field.shape), field.dtype) for name, field in layout.items() if not field.per_gene
        }
        self.genes: dict[str, list[np.ndarray]] = {name: [] for name, field in layout.items() if field.per_gene}
        self.rows: list[np.ndarray] = []

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Take the results of a batch."""
        rows = values[ROWS]
        for name, array in self.cells.items():
            array[rows] = values[name]
        for name, arrays in self.genes.items():
            arrays.append(values[name])
        self.rows.append(rows)

    def flush(self) -> None:
        """Nothing waits."""

    @property
    def n_genes(self) -> np.ndarray:
        """Genes of each cell with a record of their own (cells,)."""
        return self.cells[N_GENES]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """What each cell from `start` to before `stop` has once."""
        return self.cells[name][start:stop]

    def read_genes(self, name: str, start: int, stop: int) -> np.ndarray:
        """What each gene of those cells has, cell after cell."""
        rows = np.concatenate(self.rows)
        row_of_gene = np.repeat(rows, self.n_genes[rows])
        order = np.argsort(row_of_gene, kind="stable")
        ends = np.concatenate([[0], np.cumsum(self.n_genes)])
        return np.concatenate(self.genes[name])[order[ends[start] : ends[stop]]]


class Recording(pl.Callback):
    """Hands every batch's predictions to a recorder, in a thread, while the next batch is computed.

    Parameters
    ----------
    on_progress
        Called in the first process before the first and after every batch.
    watchdog
        Is told how to keep what is there, if there is one.
    """

    def __init__(self, on_progress: OnProgress | None, watchdog: Watchdog | None = None) -> None:
        self.on_progress, self.watchdog = on_progress, watchdog
        self.recorder: Recorder | None = None
        self.thread: ThreadPoolExecutor | None = None
        self.waiting: deque[Future[int]] = deque()

    def expect(self, lengths: np.ndarray, open_recorder: Callable[[int], Recorder], n_done: int = 0) -> None:
        """Say how many genes each cell has (cells,), how many cells are done, and where results go, by process."""
        self.n_cells, self.n_done, self.open_recorder = len(lengths), n_done, open_recorder
        self.has_genes = lengths > 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        self.recorder = self.open_recorder(trainer.global_rank)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="recording")
        if not trainer.is_global_zero:
            self.on_progress = None
        if self.on_progress is not None:
            self.on_progress(self.n_done, self.n_cells)
        if self.watchdog is not None:
            self.watchdog.flush = self._flush
            self.watchdog.take_signals()  # Lightning's handler speaks to the other processes, which may be gone

    def on_predict_batch_end(  # noqa: D102
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Prediction, *unused: object
    ) -> None:
        assert self.recorder is not None
        assert self.thread is not None
        results = {name: value for name, value in outputs._asdict().items() if value is not None}
        on_host = {name: value.to("cpu", non_blocking=True) for name, value in results.items()}
        arrival = (
            torch.cuda.current_stream(pl_module.device).record_event() if pl_module.device.type == "cuda" else None
        )
        self.waiting.append(self.thread.submit(self._record, self.recorder, on_host, arrival))
        self._await_recording(trainer, BATCHES_WAITING)
        if trainer.received_sigterm:  # Lightning has handled the signal, where there is no watchdog
            raise Ended(signal.SIGTERM)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        assert self.recorder is not None
        assert self.thread is not None
        self._await_recording(trainer, 0)
        self.thread.shutdown()
        self.recorder.flush()
        trainer.strategy.barrier()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keep what is there; a recorder that has failed keeps no more."""
        if self.thread is not None:
            self.thread.shutdown()
        if self.recorder is not None:
            try:
                self.recorder.flush()
            except Exception as error:  # one that has failed raises the same again
                if error is not exception:
                    logger.warning("%s", str(error) or repr(error))

    def _flush(self) -> None:
        """Keep what is there, while the main thread cannot."""
        if self.thread is not None and self.recorder is not None:
            with suppress(RuntimeError):  # the main thread has ended the thread, and flushes itself
                self.thread.submit(self.recorder.flush).result()

    def _await_recording(self, trainer: pl.Trainer, most_waiting: int) -> None:
        """Let no more than so many batches wait; an error in recording one of them is raised here."""
        while len(self.waiting) > most_waiting:
            n_cells = self.waiting.popleft().result()
            if self.on_progress is not None:
                # Other processes are taken to be as far as this one.
                self.n_done = min(self.n_done + n_cells * trainer.world_size, self.n_cells)
                self.on_progress(self.n_done, self.n_cells)

    def _record(self, recorder: Recorder, results: dict[str, torch.Tensor], arrival: torch.Event | None) -> int:
        """Record a batch once it has come from the device, and tell of how many cells it was."""
        if arrival is not None:
            arrival.synchronize()
        values = {name: value.numpy() for name, value in results.items()}
        if N_GENES in values:  # of the genes only those that are there
            is_gene = np.arange(values["genes"].shape[1]) < values[N_GENES][:, None]  # (B, L)
            values |= {name: values[name][is_gene] for name in ("genes", "cge_embeddings")}
        self._check(values)
        recorder.add(values)
        return len(values[ROWS])

    def _check(self, values: Mapping[str, np.ndarray]) -> None:
        """A cell without genes has no likelihood; all other numbers are finite."""
        rows, vectors = values[ROWS], {name: values[name] for name in VECTORS if name in values}
        rows_of = dict.fromkeys(vectors, rows)
        if "llh" in vectors:
            has_genes = self.has_genes[rows]
            vectors["llh"], rows_of["llh"] = vectors["llh"][has_genes], rows[has_genes]
        if N_GENES in values:
            rows_of["cge_embeddings"] = np.repeat(rows, values[N_GENES])
        check_finite(vectors, rows_of)
