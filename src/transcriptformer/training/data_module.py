"""The LightningDataModule of training, which serves each process its share of every step."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import pytorch_lightning as pl

from transcriptformer.data.batches import Batch, BatchLimits, BatchLoader
from transcriptformer.data.reader import CellReader
from transcriptformer.data.survey import Survey, survey_cells
from transcriptformer.errors import DamagedError, UsageError
from transcriptformer.training.baseline import Baseline, GeneStatistics, measure_baseline
from transcriptformer.training.config import TrainConfig
from transcriptformer.training.corpus import Corpus, Split
from transcriptformer.training.folder import TrainingFolder
from transcriptformer.training.order import Epochs
from transcriptformer.training.stream import StepLoader, TrainingDataset

logger = logging.getLogger(__name__)

MAX_STATISTICS_CELLS = 2**15
"""Maximum number of training cells for gene frequencies and mean counts."""

MAX_BASELINE_BATCHES = 2**12
"""Maximum number of validation batches on which the baseline is measured."""


class TrainingData(pl.LightningDataModule):
    """Training steps and validation batches of one process.

    Parameters
    ----------
    corpus, readers
        The cells, and their readers aligned with the vocabularies.
    config
        Settings of the run.
    limits
        Limits of a batch.
    pad, n_tokens
        Padding token, and number of tokens.
    folder
        Folder for the survey of the cells and the baseline.
    n_processes
        Number of processes of the run.
    begin
        Called in the first process before counts are read.
    on_ready
        Called in every process once cells and steps are known.
    """

    def __init__(
        self,
        corpus: Corpus,
        readers: Sequence[CellReader],
        config: TrainConfig,
        limits: BatchLimits,
        pad: int,
        n_tokens: int,
        folder: TrainingFolder,
        n_processes: int,
        begin: Callable[[], None],
        on_ready: Callable[["TrainingData"], None],
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = False
        self.begin, self.on_ready, self.is_ready = begin, on_ready, False
        self.corpus, self.readers, self.config, self.limits = corpus, readers, config, limits
        self.pad, self.n_tokens, self.folder = pad, n_tokens, folder
        self.n_streams = count_streams(config, n_processes)

    def prepare_data(self) -> None:
        """Read every cell once and measure the baseline, unless an earlier run did; called in the first process."""
        self.begin()
        if self._is_prepared():
            return
        data = self.config.model.data_config
        survey = survey_cells(self.readers, data)
        split = Split(self.corpus, survey)
        epochs = split.epochs(self.n_streams)
        statistics = GeneStatistics.from_tokens((block.tokens for block in self._first_cells(epochs)), self.n_tokens)
        model, loss = self.config.model.model_config, self.config.model.loss_config
        batches = islice(self._validation_batches(split, 0, 1), MAX_BASELINE_BATCHES)
        baseline = measure_baseline(statistics, batches, self.pad, model, loss, data.clip_counts)
        survey.save(self.folder.survey)
        statistics.save(self.folder.statistics)
        baseline.save(self.folder.baseline)

    def _is_prepared(self) -> bool:
        """Whether an earlier run has saved the survey, the statistics and the baseline, undamaged."""
        saved = (self.folder.survey, self.folder.statistics, self.folder.baseline)
        if not any(path.exists() for path in saved):
            return False
        try:
            Survey.load(self.folder.survey)
            GeneStatistics.load(self.folder.statistics)
            Baseline.load(self.folder.baseline)
        except DamagedError as error:
            logger.warning("%s; all cells are read again", error)
            return False
        return True

    def setup(self, stage: str) -> None:
        """Load the survey and compute the number of steps; called in every process."""
        if self.is_ready:
            return
        self.is_ready = True
        self.split = Split(self.corpus, Survey.load(self.folder.survey))
        self.statistics = GeneStatistics.load(self.folder.statistics)
        self.epochs = self.split.epochs(self.n_streams)
        training = self.config.training
        self.n_steps = sum(self.epochs.n_steps(epoch) for epoch in range(training.max_epochs))
        if training.max_steps is not None:
            self.n_steps = min(self.n_steps, training.max_steps)
        self.validate_every = training.validate_every or self.epochs.n_steps(0)
        self.on_ready(self)

    def train_dataloader(self) -> "StepsUntilValidation":
        """Return the steps until the next validation."""
        return StepsUntilValidation(self)

    def val_dataloader(self) -> BatchLoader:
        """Return the validation batches of this process."""
        assert self.trainer is not None
        return self._validation_batches(self.split, self.trainer.global_rank, self.trainer.world_size)

    def steps(self, start: int) -> StepLoader:
        """Return the steps of this process from `start` to the next validation or the end of training."""
        assert self.trainer is not None
        stop = min((start // self.validate_every + 1) * self.validate_every, self.n_steps)
        process, n_processes = self.trainer.global_rank, self.trainer.world_size
        dataset = TrainingDataset(self.readers, self.epochs, range(start, stop), process, n_processes)
        return StepLoader(
            dataset,
            self.limits,
            self.pad,
            self.config.model.model_config.seq_len,
            self.config.model.data_config.n_data_workers,
            pin_memory=self._is_on_gpu,
        )

    def _first_cells(self, epochs: Epochs) -> Iterator[Any]:
        """Yield the first cells of the first epoch."""
        n_steps = min(epochs.n_steps(0), -(-MAX_STATISTICS_CELLS // epochs.batch_size))
        return islice(TrainingDataset(self.readers, epochs, range(n_steps)), n_steps)

    def _validation_batches(self, split: Split, process: int, n_processes: int) -> BatchLoader:
        cells = split.validation_cells(self.readers, process, n_processes)
        return BatchLoader(
            cells,
            self.limits,
            self.pad,
            self.config.model.model_config.seq_len,
            n_workers=self.config.model.data_config.n_data_workers,
            pin_memory=self._is_on_gpu,
        )

    @property
    def _is_on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


def count_streams(config: TrainConfig, n_processes: int) -> int:
    """Return the number of streams: `training.streams`, at most one per cell of a step, at least one per worker.

    Raises
    ------
    UsageError
        If there are more workers than cells in a step.
    """
    training, n_workers = config.training, max(1, config.model.data_config.n_data_workers)
    n_shards = n_processes * n_workers
    if n_shards > training.batch_size:
        raise UsageError(
            f"training.batch_size={training.batch_size} is less than {n_processes} processes x {n_workers} workers, "
            "each of which needs a cell per step; raise the batch size or lower n_data_workers"
        )
    n_streams = max(min(training.streams, training.batch_size), n_shards)
    if n_streams > training.streams:
        logger.info("training.streams raised to %d, one per worker of each process", n_streams)
    return n_streams


class StepsUntilValidation:
    """The steps from the current one to the next validation, which the Trainer treats as an epoch."""

    def __init__(self, data: TrainingData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[list[Batch]]:
        assert self.data.trainer is not None
        return iter(self.data.steps(self.data.trainer.global_step))
