"""What the Trainer is watched by: the state of training is saved as it goes on, and its end is seen to."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from transcriptformer.metrics import MetricsFile
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
    save_every
        Steps between saving.
    metrics
        Is told from which step a run goes on.
    on_step
        Called in the first process after every step.
    """

    def __init__(self, folder: TrainingFolder, save_every: int, metrics: MetricsFile, on_step: OnStep | None) -> None:
        self.folder, self.save_every, self.metrics, self.on_step = folder, save_every, metrics, on_step
        self.best_loss, self.best_step, self.is_done = math.inf, 0, False
        self.n_steps, self.validate_every = 0, 0

    def expect(self, n_steps: int, validate_every: int) -> None:
        """Say how many steps there are, and after how many of them a validation comes."""
        self.n_steps, self.validate_every = n_steps, validate_every

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {"best_loss": self.best_loss, "best_step": self.best_step, "is_done": self.is_done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict` told."""
        self.best_loss, self.best_step = state_dict["best_loss"], state_dict["best_step"]
        self.is_done = state_dict["is_done"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        if trainer.global_step:
            logger.info("going on from step %d of %d", trainer.global_step, self.n_steps)
        self.metrics.begin(trainer.global_step)
        trainer.should_stop = self.is_done

    def on_train_batch_end(  # noqa: D102
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: object
    ) -> None:
        step = trainer.global_step
        if self.on_step is not None and trainer.is_global_zero:
            self.on_step(step, self.n_steps, float(trainer.callback_metrics["loss"]))
        is_last = step == self.n_steps
        comes_validation = step % self.validate_every == 0 or is_last  # which is to be repeated if it is interrupted
        if trainer.received_sigterm or (step % self.save_every == 0 and not comes_validation):
            trainer.save_checkpoint(self.folder.last)
        if trainer.received_sigterm:  # as a scheduler sends it some seconds before it kills
            raise SystemExit(SIGTERM_EXIT_CODE)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a validation, and what it has led to."""
        loss = trainer.callback_metrics.get("validation_loss")
        if loss is None or float(loss) < self.best_loss:
            self.best_loss = math.inf if loss is None else float(loss)
            self.best_step = trainer.global_step
            trainer.save_checkpoint(self.folder.best, weights_only=True)
        self.is_done = trainer.should_stop = trainer.should_stop or trainer.global_step >= self.n_steps
        trainer.save_checkpoint(self.folder.last)
