"""Record predictions in memory or on disk while the next batch is computed."""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch

from transcriptformer.errors import TranscriptFormerError
from transcriptformer.runs.task import Prediction
from transcriptformer.runtime.watchdog import Watchdog
from transcriptformer.storage.results import N_GENES, ROWS, Layout

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""Called with the number of completed cells (or prompts, genes, …) and of all of them."""

MAX_PENDING_BATCHES = 2
"""Batches that may wait to be recorded while the next one is computed."""


def check_finite(values: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> None:
    """Raise TranscriptFormerError if results are NaN or infinite.

    Parameters
    ----------
    values
        Results by name, with entries along the first axis.
    rows
        Output row of each entry, by name.
    """
    for name, array in values.items():
        # Fast path: the minimum and maximum are NaN if any entry is.
        if array.size == 0 or np.isfinite([array.min(), array.max()]).all():
            continue
        is_bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
        bad = np.unique(rows[name][is_bad])
        examples = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        raise TranscriptFormerError(
            f"{name.removeprefix('cge_')} of {len(bad)} cells of a batch are NaN or infinite (rows {examples} of the "
            "output): weights or counts are too large for this precision; use --precision 32"
        )


class Recorder(Protocol):
    """Records results batch by batch, by field name."""

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Add the results of a batch."""
        ...

    def flush(self) -> None:
        """Store all recorded results durably."""
        ...


class MemoryRecorder:
    """Holds results of `n_cells` cells in memory, with the interface of `transcriptformer.storage.results.Pieces`."""

    def __init__(self, layout: Layout, n_cells: int) -> None:
        self.layout = layout
        self.cells = {
            name: np.empty((n_cells, *field.shape), field.dtype) for name, field in layout.items() if not field.per_gene
        }
        self.genes: dict[str, list[np.ndarray]] = {name: [] for name, field in layout.items() if field.per_gene}
        self.rows: list[np.ndarray] = []

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Add the results of a batch."""
        rows = values[ROWS]
        for name, array in self.cells.items():
            array[rows] = values[name]
        for name, arrays in self.genes.items():
            arrays.append(values[name])
        self.rows.append(rows)

    def flush(self) -> None:
        """Do nothing; results are not buffered."""

    @property
    def n_genes(self) -> np.ndarray:
        """Number of gene records of each cell (cells,)."""
        return self.cells[N_GENES]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read the per-cell records of cells `start:stop`."""
        return self.cells[name][start:stop]

    def read_genes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read the per-gene records of cells `start:stop`, cell by cell."""
        ends = np.concatenate([[0], np.cumsum(self.n_genes)])
        field = self.layout[name]
        values = np.empty((ends[stop] - ends[start], *field.shape), field.dtype)
        for rows, of_batch in zip(self.rows, self.genes[name], strict=True):
            lengths = self.n_genes[rows]
            first = np.repeat(ends[rows] - (np.cumsum(lengths) - lengths), lengths)
            places = first + np.arange(len(of_batch)) - ends[start]
            is_wanted = (places >= 0) & (places < len(values))
            values[places[is_wanted]] = of_batch[is_wanted]
        return values


class Recording:
    """Context that records predictions in a background thread while the next batch is computed.

    Results are flushed at the end of the block, also after an error.

    Parameters
    ----------
    recorder
        Records the results.
    layout
        Fields of the results.
    lengths
        Number of genes of each cell of the run (cells,).
    n_done
        Number of cells that are already done.
    n_processes
        Number of processes, which are assumed to progress at the same rate.
    on_progress
        Called before the first batch and after each batch.
    watchdog
        Watchdog that flushes results before ending the process, if any.
    """

    def __init__(
        self,
        recorder: Recorder,
        layout: Layout,
        lengths: np.ndarray,
        n_done: int = 0,
        n_processes: int = 1,
        on_progress: OnProgress | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.recorder, self.layout = recorder, layout
        self.has_genes, self.n_cells = lengths > 0, len(lengths)
        self.n_done, self.n_processes, self.on_progress = n_done, n_processes, on_progress
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="recording")
        self.pending: deque[Future[int]] = deque()
        if watchdog is not None:
            watchdog.flush = self._flush

    def __enter__(self) -> Self:
        if self.on_progress is not None:
            self.on_progress(self.n_done, self.n_cells)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._keep(error)
            return
        try:
            self._await_recording(0)
        except BaseException as failure:
            self._keep(failure)
            raise
        self.thread.shutdown()
        self.recorder.flush()

    def _keep(self, error: BaseException) -> None:
        """Flush what was recorded before an error."""
        self.thread.shutdown()
        try:
            self.recorder.flush()
        except Exception as failure:  # a failed recorder raises its error again
            if failure is not error:
                logger.warning("%s", str(failure) or repr(failure))

    def add(self, prediction: Prediction) -> None:
        """Record a batch, after waiting for the batches before the previous ones."""
        device = prediction[ROWS].device
        on_host = {name: value.to("cpu", non_blocking=device.type == "cuda") for name, value in prediction.items()}
        copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self.pending.append(self.thread.submit(self._record, on_host, copied))
        self._await_recording(MAX_PENDING_BATCHES)

    def _flush(self) -> None:
        """Flush the recorder when the main thread cannot."""
        with suppress(RuntimeError):  # shut down by the main thread, which then flushes
            self.thread.submit(self.recorder.flush).result()

    def _await_recording(self, max_pending: int) -> None:
        """Wait until at most `max_pending` batches are pending; errors in recording are raised here."""
        while len(self.pending) > max_pending:
            n_cells = self.pending.popleft().result()
            self.n_done = min(self.n_done + n_cells * self.n_processes, self.n_cells)
            if self.on_progress is not None:
                self.on_progress(self.n_done, self.n_cells)

    def _record(self, results: dict[str, torch.Tensor], copied: torch.Event | None) -> int:
        """Record a batch once it is copied from the device, and return its number of cells."""
        if copied is not None:
            copied.synchronize()
        values = {name: value.numpy() for name, value in results.items()}
        if N_GENES in values:  # remove padding
            of_genes = [name for name, field in self.layout.items() if field.per_gene]
            is_gene = np.arange(values[of_genes[0]].shape[1]) < values[N_GENES][:, None]  # (B, L)
            values |= {name: values[name][is_gene] for name in of_genes}
        self._check(values)
        self.recorder.add(values)
        return len(values[ROWS])

    def _check(self, values: Mapping[str, np.ndarray]) -> None:
        """Check that results are finite, except missing ones and those of genes in cells without genes."""
        rows, floats, rows_of = values[ROWS], {}, {}
        for name, field in self.layout.items():
            if not np.issubdtype(field.dtype, np.floating):
                continue
            floats[name], rows_of[name] = values[name], rows
            if field.per_gene:
                rows_of[name] = np.repeat(rows, values[N_GENES])
            elif field.of_genes:
                has_genes = self.has_genes[rows]
                floats[name], rows_of[name] = values[name][has_genes], rows[has_genes]
            if field.may_be_missing:
                floats[name] = np.where(np.isnan(floats[name]), 0, floats[name])
        check_finite(floats, rows_of)
