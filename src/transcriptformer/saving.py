"""What the Trainer is watched by: the state of training is saved as it goes on, and its end is seen to."""

import logging
import math
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from transcriptformer.metrics import MetricsFile
from transcriptformer.train_config import TrainingConfig
from transcriptformer.trainer import SIGTERM_EXIT_CODE
from transcriptformer.training_folder import TrainingFolder

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, float], None]
"""Called with how many steps are done, how many there are, and the loss of the latest."""


class Saving(pl.Callback):
    """Saves the latest state every so many steps and after every validation, and the weights of the best validation.

    Parameters
    ----------
    folder
        Where.
    training
        How often, and after how many validations without a better loss to stop.
    metrics
        Is told from which step a run goes on.
    on_step
        Called in the first process after every step.
    """

    def __init__(
        self, folder: TrainingFolder, training: TrainingConfig, metrics: MetricsFile, on_step: OnStep | None
    ) -> None:
        self.folder, self.training, self.metrics, self.on_step = folder, training, metrics, on_step
        self.best_loss, self.best_step, self.n_worse = math.inf, 0, 0
        self.is_done = self.is_told_to_end = False
        self.n_steps, self.validate_every = 0, 0

    def expect(self, n_steps: int, validate_every: int) -> None:
        """Say how many steps there are, and after how many of them a validation comes."""
        self.n_steps, self.validate_every = n_steps, validate_every

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {name: getattr(self, name) for name in ("best_loss", "best_step", "n_worse", "is_done")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict` told."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        if trainer.global_step:
            logger.info("going on from step %d of %d", trainer.global_step, self.n_steps)
        self.metrics.begin(trainer.global_step)
        trainer.should_stop = self.is_done
        if threading.current_thread() is threading.main_thread():
            # Lightning's own handler speaks to the other processes at once, which may be in the middle of something.
            signal.signal(signal.SIGTERM, self._end)

    def on_train_batch_end(  # noqa: D102
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: object
    ) -> None:
        step = trainer.global_step
        if self.on_step is not None and trainer.is_global_zero:
            self.on_step(step, self.n_steps, float(trainer.callback_metrics["loss"]))
        if step % self.validate_every == 0 or step == self.n_steps:
            return  # a validation comes, without which this step is not complete
        ends = self._ends(trainer)
        if ends or step % self.training.save_every == 0:
            trainer.save_checkpoint(self.folder.last)
        if ends:
            raise SystemExit(SIGTERM_EXIT_CODE)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a validation, and what it has led to."""
        loss = trainer.callback_metrics.get("validation_loss")
        if loss is None or float(loss) < self.best_loss:
            self.best_loss = math.inf if loss is None else float(loss)
            self.best_step, self.n_worse = trainer.global_step, 0
            trainer.save_checkpoint(self.folder.best, weights_only=True)
        else:
            self.n_worse += 1
        is_patient = self.training.patience is None or self.n_worse < self.training.patience
        self.is_done = trainer.should_stop = trainer.global_step >= self.n_steps or not is_patient
        trainer.save_checkpoint(self.folder.last)
        if self._ends(trainer):
            raise SystemExit(SIGTERM_EXIT_CODE)

    def _ends(self, trainer: pl.Trainer) -> bool:
        """Whether one of the processes was told to end, as a scheduler does some seconds before it kills."""
        return trainer.strategy.reduce_boolean_decision(self.is_told_to_end, all=False)

    def _end(self, *unused: object) -> None:
        self.is_told_to_end = True
