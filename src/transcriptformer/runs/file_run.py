"""File-based runs: intermediate results on disk, and the final output."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from transcriptformer.data.batches import BatchLoader
from transcriptformer.data.fingerprint import identify, identify_file
from transcriptformer.data.store import Location
from transcriptformer.data.survey import Survey, survey_cells
from transcriptformer.errors import DamagedError, OutputError
from transcriptformer.runs.batch_size import batch_limits
from transcriptformer.runs.inputs import Inputs
from transcriptformer.runs.output import pooled_to_anndata, provenance_of, write_anndata, write_cells
from transcriptformer.runs.pooling import Pool, PoolWriter, new_pool, read_pools, saved_rows, verified_rows
from transcriptformer.runs.recording import OnProgress, Recorder, Recording
from transcriptformer.runs.task import Task
from transcriptformer.runtime.device import compute_dtype
from transcriptformer.runtime.processes import Processes
from transcriptformer.runtime.signals import RESUME
from transcriptformer.runtime.watchdog import Watchdog
from transcriptformer.storage.atomic import check_free_space
from transcriptformer.storage.results import Pieces, PieceWriter, open_pieces, verified_pieces
from transcriptformer.storage.workspace import Workspace, flatten

logger = logging.getLogger(__name__)

_IDENTITY_EXCLUDED = {
    "model.data_config.n_data_workers",
    "model.data_config.block_size",
    "model.data_config.allow_external_links",
    "model.data_config.gene_map",
    *(
        f"model.inference_config.{name}"
        for name in (
            *("batch_size", "tokens_per_batch", "device", "attention", "num_gpus", "num_nodes", "oom_dataloader"),
            *("resume", "output_path", "output_filename", "pretrained_embedding"),
        )
    ),
}
"""Settings that do not affect the results, and may change when resuming. (Files are compared by content.)"""


class FileRun:
    """The inputs and results of one process of a run, which the first one writes when all are done.

    The first process calls `prepare`, then all call `load`, then `batches` and `recording` are available.

    Parameters
    ----------
    locations
        Input files.
    task
        What is computed.
    workspace
        Folder for intermediate results.
    weights_sha256
        Returns the hash of the weights, which may take a while.
    processes
        The processes of the run.
    """

    def __init__(
        self,
        locations: Sequence[Location],
        task: Task,
        workspace: Workspace,
        weights_sha256: Callable[[], str],
        processes: Processes,
    ) -> None:
        self.locations, self.task, self.workspace = locations, task, workspace
        self.checkpoint = checkpoint = task.checkpoint
        self.weights_sha256, self.processes = weights_sha256, processes
        self.inference = checkpoint.config.model.inference_config
        self.initial_inputs = self._identify_inputs()  # before they are opened
        self.inputs = Inputs(locations, task)
        self.layout = task.layout
        self.survey: Survey | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the results: settings, checkpoint, and inputs as of the start of the run."""
        return {
            "settings": {
                **{
                    key: value
                    for key, value in flatten(asdict(self.checkpoint.config))
                    if key not in _IDENTITY_EXCLUDED
                },
                "type of matrix products": str(compute_dtype(self.inference.precision, self.checkpoint.device)),
            },
            **({"task": dict(self.task.settings)} if self.task.settings else {}),
            "inputs": [
                {**content, "counts and genes": reader.source.identify()}
                for content, reader in zip(self.initial_inputs, self.inputs.readers, strict=True)
            ],
            "pretrained embeddings": [identify_file(Path(file)) for file in self.inference.pretrained_embedding],
            "checkpoint": {"weights": self.weights_sha256(), **self.checkpoint.identify_vocabularies()},
        }

    def _identify_inputs(self) -> list[dict[str, str]]:
        return [identify(location) for location in self.locations]

    def prepare(self) -> None:
        """Survey the inputs and create the workspace, or validate an existing one; for the first process."""
        if self.workspace.can_resume(self.identity):
            self.survey = self._load_survey()
        else:
            self.inputs.check_obs(as_zarr=self.workspace.output.suffix == ".zarr")
            self.survey = self._new_survey()
            with self.workspace.create(self.identity):
                self.survey.save(self._survey_file)
        self.workspace.write_done_mask(self._is_done(self.survey.n_kept))

    def _load_survey(self) -> Survey:
        try:
            return Survey.load(self._survey_file)
        except DamagedError as error:
            logger.warning("%s; all cells are read again", error)
        survey = self._new_survey()
        survey.save(self._survey_file)
        return survey

    def _new_survey(self) -> Survey:
        return survey_cells(self.inputs.readers, self.checkpoint.config.model.data_config)

    def load(self) -> None:
        """Load the survey and the mask of completed cells that `prepare` has written."""
        self.survey = Survey.load(self._survey_file)
        self.is_done = self.workspace.read_done_mask()
        self.task.prepare(self.inputs, self.survey)
        if self.processes.is_first:
            self.inputs.log_summary(self.survey)
            if n_done := int(self.is_done.sum()):
                logger.info("resuming: %d cells are already done", n_done)

    def batches(self) -> BatchLoader:
        """Return the batches of this process."""
        assert self.survey is not None
        limits = self.task.limit_batches(batch_limits(self.checkpoint, self.processes.per_node))
        return self.inputs.loader(self.survey, limits, self.processes.rank, self.processes.total, self.is_done)

    def recording(self, on_progress: OnProgress | None, watchdog: Watchdog) -> Recording:
        """Return the context that records the results of this process."""
        assert self.survey is not None
        lengths, n_done = self.survey.lengths[self.survey.kept], int(self.is_done.sum())
        on_progress = on_progress if self.processes.is_first else None
        return Recording(self._recorder(), self.layout, lengths, n_done, self.processes.total, on_progress, watchdog)

    def _recorder(self) -> Recorder:
        folder, rank, run_id = self.workspace.folder, self.processes.rank, self.workspace.run_id
        if self.task.pool is None:
            return PieceWriter(folder, rank, self.layout, run_id)
        return PoolWriter(folder, rank, self._new_pool(), run_id)

    def describe_kept(self) -> str | None:
        """Describe the results kept by an interrupted run; an empty workspace is removed."""
        if self.survey is None:
            return None
        try:
            n_done = self._count_kept(self.survey.n_kept)
        except OutputError as error:
            logger.warning("%s", error)
            return None
        if n_done == 0:
            self.workspace.remove()
            return None
        return f"{n_done} of {self.survey.n_kept} cells are kept in {self.workspace.folder}; {RESUME}"

    def write(self) -> None:
        """Write the output from the intermediate results, then remove them.

        Raises
        ------
        OutputError
            If the output cannot be written, or intermediate results are missing or damaged; the rest is kept.
        """
        assert self.survey is not None
        survey = self.survey
        if self._identify_inputs() != self.initial_inputs:
            self.workspace.remove()  # or a resumed run would use it if the input were restored
            raise OutputError(
                f"an input changed while it was read ({', '.join(map(str, self.locations))}); the results are deleted; "
                "run the command again"
            )
        provenance = provenance_of(
            self.locations, self.checkpoint, self.weights_sha256(), self.inputs.inferred(), self.identity
        )
        output = self.workspace.output
        if self.task.pool is not None:
            pool = self._new_pool()
            self._require_complete(read_pools(self.workspace.folder, self.workspace.run_id, pool))
            names, groups = self.checkpoint.gene_vocab.names(), self.inputs.groups(survey)[1]
            table = pool.table(names, groups, self.inputs.group_column)
            write_anndata(pooled_to_anndata(self.task, *table, provenance), output)
        else:
            pieces = Pieces(verified_pieces(self.workspace.folder, self.workspace.run_id), self.layout)
            self._require_complete(pieces.is_done(survey.n_kept))
            advice = "; all results are kept; free up space, then rerun the same command with --resume"
            check_free_space(output, pieces.n_bytes, advice)
            obs_blocks = partial(self.inputs.obs_blocks, survey)
            write_cells(output, survey.n_kept, obs_blocks, self.task, pieces, provenance)
        self.workspace.remove()

    @property
    def _survey_file(self) -> Path:
        return self.workspace.folder / "survey.safetensors"

    def _is_done(self, n_cells: int) -> np.ndarray:
        """Mask (cells,) of the kept cells with intact results on disk."""
        folder, run = self.workspace.folder, self.workspace.run_id
        if self.task.pool is not None:
            return verified_rows(folder, run, n_cells)
        return Pieces(verified_pieces(folder, run), self.layout).is_done(n_cells)

    def _count_kept(self, n_cells: int) -> int:
        """Count the cells with results on disk, without reading these."""
        if self.task.pool is not None:
            return int(saved_rows(self.workspace.folder, n_cells).sum())
        return len(Pieces(open_pieces(self.workspace.folder), self.layout).rows)

    def _require_complete(self, is_done: np.ndarray) -> None:
        n_missing = len(is_done) - int(is_done.sum())
        if n_missing:
            raise OutputError(
                f"{self.workspace.folder}: {n_missing} of {len(is_done)} cells are missing: another process was "
                "killed, or intermediate results are damaged; rerun the same command with --resume"
            )

    def _new_pool(self) -> Pool:
        assert self.survey is not None
        return new_pool(self.task, self.inputs.groups(self.survey)[0])
