"""A run from files to a file: what it keeps on disk while it goes on, and how that becomes the result."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl

from transcriptformer.batching import batch_limits
from transcriptformer.checkpoint import Checkpoint
from transcriptformer.data.dataset import BatchLoader
from transcriptformer.data.store import Location
from transcriptformer.data.survey import Survey, survey_cells
from transcriptformer.device import compute_dtype
from transcriptformer.errors import OutputError
from transcriptformer.inputs import Inputs
from transcriptformer.output import check_room, pooled_to_anndata, provenance_of, write_anndata, write_cells
from transcriptformer.parts import Parts, PartWriter, layout_of
from transcriptformer.pooling import Pool, PoolWriter, read_pools, rows_pooled
from transcriptformer.recording import Recorder, Recording
from transcriptformer.workspace import Workspace, identify

logger = logging.getLogger(__name__)


class FileRun(pl.LightningDataModule):
    """Serves the batches of one process, and writes the result when all processes are done.

    Parameters
    ----------
    locations
        The inputs.
    checkpoint
        The model, with its configuration.
    workspace
        Where results are kept meanwhile.
    weights_sha256
        Called for the hash of the weights, which takes a while.
    recording
        Is told how many cells there are.
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
        self.inputs = Inputs(locations, checkpoint)
        self.layout = layout_of(self.inference, checkpoint.width, checkpoint.label_head is not None)
        self.survey: Survey | None = None

    def identity(self) -> dict[str, Any]:
        """What decides about the numbers."""
        dtype = str(compute_dtype(self.inference.precision, self.checkpoint.device))
        return identify(self.locations, self.checkpoint.config, dtype, self.weights_sha256())

    def prepare_data(self) -> None:
        """Read through the inputs and make the workspace, or see that it is of this very run; in one process only."""
        if not self.inference.resume:
            self.workspace.refuse_leftover()
        if self.workspace.exists:
            self.workspace.check_same(self.identity())
            self.workspace.lock()
            self.survey = self.workspace.survey()
        else:
            self.survey = survey_cells(self.inputs.readers, self.checkpoint.config.model.data_config)
            self.workspace.create(self.identity(), self.survey)
        self.workspace.note_done(self._is_done())

    def setup(self, stage: str) -> None:
        """Find out what there is to do; in every process."""
        self.survey = self.workspace.survey()
        self.is_done = self.workspace.done()
        n_done = int(self.is_done.sum())
        self.recording.expect(self.survey.n_kept, self.open_recorder, n_done)
        if self.trainer is None or self.trainer.is_global_zero:
            self.inputs.tell(self.survey)
            if n_done:
                logger.info("%d of them are done already", n_done)

    def predict_dataloader(self) -> BatchLoader:
        """Batches of this process."""
        assert self.trainer is not None and self.survey is not None  # noqa: PT018
        limits = batch_limits(self.checkpoint, self.processes_per_node)
        return self.inputs.loader(self.survey, limits, self.trainer.global_rank, self.trainer.world_size, self.is_done)

    def open_recorder(self, process: int) -> Recorder:
        """Where the results of a process go."""
        if self.inference.cge_pool is None:
            return PartWriter(self.workspace.folder, process, self.layout)
        return PoolWriter(self.workspace.folder, process, self._new_pool())

    def tell_what_is_kept(self) -> None:
        """Log what a run that ends early leaves behind; a workspace without results goes."""
        if self.survey is None:
            return
        n_done = int(self._is_done().sum())
        if n_done == 0:
            self.workspace.remove()
        else:
            logger.info(
                "%d of %d cells are kept in %s; the same command with --resume goes on",
                *(n_done, self.survey.n_kept, self.workspace.folder),
            )

    def write(self) -> None:
        """Make the result of all parts, and remove these.

        Raises
        ------
        OutputError
            If it cannot be written; the parts stay.
        """
        assert self.survey is not None
        survey = self.survey
        missing = survey.n_kept - int(self._is_done().sum())
        if missing:
            raise OutputError(
                f"{self.workspace.folder}: {missing} of {survey.n_kept} cells are missing, as if another process "
                "had been killed; run the same command with --resume"
            )
        sha256 = self.weights_sha256()
        provenance = provenance_of(self.locations, self.checkpoint, sha256, self.identity())
        names, output = self.checkpoint.gene_vocab.names(), self.workspace.output
        if self.inference.cge_pool is not None:
            pool = self._new_pool()
            read_pools(self.workspace.folder, pool)
            table = pool.table(names, self.inputs.groups(survey)[1], self.inputs.group_column)
            write_anndata(pooled_to_anndata(*table, provenance), output)
        else:
            parts = Parts(self.workspace.folder, self.layout)
            check_room(output, parts.n_bytes)
            obs_blocks, label_head = partial(self.inputs.obs_blocks, survey), self.checkpoint.label_head
            write_cells(output, survey.n_kept, obs_blocks, parts, names, provenance, label_head)
        self.workspace.remove()

    def _is_done(self) -> np.ndarray:
        """Mask of the kept cells whose results are safely on disk."""
        assert self.survey is not None
        n_cells = self.survey.n_kept
        if self.inference.cge_pool is not None:
            return rows_pooled(self.workspace.folder, n_cells)
        return Parts(self.workspace.folder, self.layout).is_done(n_cells)

    def _new_pool(self) -> Pool:
        assert self.survey is not None
        return Pool(self.inputs.groups(self.survey)[0], len(self.checkpoint.gene_vocab), self.checkpoint.width)
