"""File-based runs: intermediate results on disk, and the final output."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.batches import BatchLoader
from transcriptformer.data.fingerprint import identify, identify_file
from transcriptformer.data.store import Location
from transcriptformer.data.survey import Survey, survey_cells
from transcriptformer.errors import DamagedError, OutputError
from transcriptformer.inference.batch_size import batch_limits
from transcriptformer.inference.inputs import Inputs
from transcriptformer.inference.output import pooled_to_anndata, provenance_of, write_anndata, write_cells
from transcriptformer.inference.pooling import Pool, PoolWriter, read_pools, saved_rows, verified_rows
from transcriptformer.inference.recording import Recorder, Recording, layout_of
from transcriptformer.runtime.device import compute_dtype
from transcriptformer.runtime.signals import RESUME
from transcriptformer.storage.atomic import check_free_space
from transcriptformer.storage.results import Pieces, PieceWriter, open_pieces, verified_pieces
from transcriptformer.storage.workspace import Workspace, flatten

logger = logging.getLogger(__name__)

_IDENTITY_EXCLUDED = {
    "model.data_config.n_data_workers",
    "model.data_config.block_size",
    "model.data_config.allow_external_links",
    *(
        f"model.inference_config.{name}"
        for name in (
            *("batch_size", "tokens_per_batch", "device", "attention", "num_gpus", "num_nodes", "oom_dataloader"),
            *("resume", "output_path", "output_filename", "pretrained_embedding"),
        )
    ),
}
"""Settings that do not affect the results, and may change when resuming. (Files are compared by content.)"""


class FileRun(pl.LightningDataModule):
    """Data module of one process, which also writes the output when all processes are done.

    Parameters
    ----------
    locations
        Input files.
    checkpoint
        Model and configuration.
    workspace
        Folder for intermediate results.
    weights_sha256
        Returns the hash of the weights, which may take a while.
    recording
        Callback that records the results.
    processes_per_node
        Number of processes that share this machine's memory.
    """

    def __init__(
        self,
        locations: Sequence[Location],
        checkpoint: Checkpoint,
        workspace: Workspace,
        weights_sha256: Callable[[], str],
        recording: Recording,
        processes_per_node: int,
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = False
        self.locations, self.checkpoint, self.workspace = locations, checkpoint, workspace
        self.weights_sha256, self.recording, self.processes_per_node = weights_sha256, recording, processes_per_node
        self.inference = checkpoint.config.model.inference_config
        self.initial_inputs = self._identify_inputs()  # before they are opened
        self.inputs = Inputs(locations, checkpoint)
        self.layout = layout_of(self.inference, checkpoint.width, checkpoint.label_head is not None)
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
            "inputs": self.initial_inputs,
            "pretrained embeddings": [identify_file(Path(file)) for file in self.inference.pretrained_embedding],
            "checkpoint": {"weights": self.weights_sha256(), **self.checkpoint.identify_vocabularies()},
        }

    def _identify_inputs(self) -> list[dict[str, str]]:
        return [identify(location) for location in self.locations]

    def prepare_data(self) -> None:
        """Survey the inputs and create the workspace, or validate an existing one; runs in one process only."""
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

    def setup(self, stage: str) -> None:
        """Load the survey and the completed cells; runs in every process."""
        self.survey = Survey.load(self._survey_file)
        self.is_done = self.workspace.read_done_mask()
        n_done = int(self.is_done.sum())
        self.recording.expect(self.survey.lengths[self.survey.kept], self.open_recorder, n_done)
        if self.trainer is None or self.trainer.is_global_zero:
            self.inputs.log_summary(self.survey)
            if n_done:
                logger.info("resuming: %d cells are already done", n_done)

    def predict_dataloader(self) -> BatchLoader:
        """Batches of this process."""
        assert self.trainer is not None and self.survey is not None  # noqa: PT018
        limits = batch_limits(self.checkpoint, self.processes_per_node)
        return self.inputs.loader(self.survey, limits, self.trainer.global_rank, self.trainer.world_size, self.is_done)

    def open_recorder(self, process: int) -> Recorder:
        """Open the recorder for the results of a process."""
        if self.inference.cge_pool is None:
            return PieceWriter(self.workspace.folder, process, self.layout, self.workspace.run_id)
        return PoolWriter(self.workspace.folder, process, self._new_pool(), self.workspace.run_id)

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
        provenance = provenance_of(self.locations, self.checkpoint, self.weights_sha256(), self.identity)
        names, output = self.checkpoint.gene_vocab.names(), self.workspace.output
        if self.inference.cge_pool is not None:
            pool = self._new_pool()
            self._require_complete(read_pools(self.workspace.folder, self.workspace.run_id, pool))
            table = pool.table(names, self.inputs.groups(survey)[1], self.inputs.group_column)
            write_anndata(pooled_to_anndata(*table, provenance), output)
        else:
            pieces = Pieces(verified_pieces(self.workspace.folder, self.workspace.run_id), self.layout)
            self._require_complete(pieces.is_done(survey.n_kept))
            advice = "; all results are kept; free up space, then rerun the same command with --resume"
            check_free_space(output, pieces.n_bytes, advice)
            obs_blocks, label_head = partial(self.inputs.obs_blocks, survey), self.checkpoint.label_head
            write_cells(output, survey.n_kept, obs_blocks, pieces, names, provenance, label_head)
        self.workspace.remove()

    @property
    def _survey_file(self) -> Path:
        return self.workspace.folder / "survey.safetensors"

    def _is_done(self, n_cells: int) -> np.ndarray:
        """Mask (cells,) of the kept cells with intact results on disk."""
        folder, run = self.workspace.folder, self.workspace.run_id
        if self.inference.cge_pool is not None:
            return verified_rows(folder, run, n_cells)
        return Pieces(verified_pieces(folder, run), self.layout).is_done(n_cells)

    def _count_kept(self, n_cells: int) -> int:
        """Count the cells with results on disk, without reading these."""
        if self.inference.cge_pool is not None:
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
        return Pool(self.inputs.groups(self.survey)[0], len(self.checkpoint.gene_vocab), self.checkpoint.width)
