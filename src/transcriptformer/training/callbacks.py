"""A Trainer callback that saves the training state, logs metrics and stops the run."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from transcriptformer.runtime.signals import RESUME
from transcriptformer.runtime.watchdog import Watchdog
from transcriptformer.training.config import TrainingConfig
from transcriptformer.training.folder import TrainingFolder
from transcriptformer.training.metrics import MetricsFile

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, float], None]
"""Called with the number of steps done, the total, and the loss of the latest step."""


class Saving(pl.Callback):
    """Saves the state periodically and after every validation, and the weights of the best validation.

    Parameters
    ----------
    folder
        Output folder of the run.
    training
        Intervals of saving and logging, and the patience of early stopping.
    metrics
        File for the metrics.
    watchdog
        Defers signals to the end of a step.
    on_step
        Called in the first process after every step.
    """

    def __init__(
        self,
        folder: TrainingFolder,
        training: TrainingConfig,
        metrics: MetricsFile,
        watchdog: Watchdog,
        on_step: OnStep | None,
    ) -> None:
        self.folder, self.training, self.metrics, self.on_step = folder, training, metrics, on_step
        self.watchdog = watchdog
        self.best_loss, self.best_step, self.n_worse = math.inf, 0, 0
        self.is_done = False
        self.n_steps, self.validate_every, self.saved_step = 0, 0, 0

    def configure(self, n_steps: int, validate_every: int) -> None:
        """Set the number of steps, and of steps between validations."""
        self.n_steps, self.validate_every = n_steps, validate_every

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        state = {name: getattr(self, name) for name in ("best_loss", "best_step", "n_worse", "is_done")}
        return {**state, "metrics": self.metrics.text}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        state = dict(state_dict)
        self.metrics.text = state.pop("metrics")
        for name, value in state.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        if trainer.global_step:
            if trainer.is_global_zero and self.best_step:
                trainer.strategy.checkpoint_io.load_checkpoint(self.folder.best)  # fails early if it is damaged
            logger.info("resuming from step %d of %d", trainer.global_step, self.n_steps)
            self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            self.metrics.begin()
        trainer.should_stop = self.is_done
        self.watchdog.install_handlers()  # Lightning's handler talks to other processes, which may be gone
        self.watchdog.is_deferred = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        self.watchdog.is_deferred = False
        if self.watchdog.received is not None:
            self.watchdog.end()

    def on_train_batch_end(  # noqa: D102
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: object
    ) -> None:
        step = trainer.global_step
        if trainer.is_global_zero and step % self.training.log_every == 0:
            self._log(trainer, is_validation=False)  # before saving, because the state includes the metrics
        if self.on_step is not None and trainer.is_global_zero:
            self.on_step(step, self.n_steps, float(trainer.callback_metrics["loss"]))
        if step % self.validate_every == 0 or step == self.n_steps:
            return  # saved after the validation, which is part of this step
        is_terminated = self._is_terminated(trainer)
        if is_terminated or step % self.training.save_every == 0:
            self._save(trainer)
        if is_terminated:
            self.watchdog.end()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the validation, save the state, and stop if the run is done."""
        loss = trainer.callback_metrics.get("validation_loss")
        if trainer.is_global_zero and loss is not None:
            self._log(trainer, is_validation=True)
        if loss is None or float(loss) < self.best_loss:
            self.best_loss = math.inf if loss is None else float(loss)
            self.best_step, self.n_worse = trainer.global_step, 0
            trainer.save_checkpoint(self.folder.best, weights_only=True)
        else:
            self.n_worse += 1
        is_patient = self.training.patience is None or self.n_worse < self.training.patience
        self.is_done = trainer.should_stop = trainer.global_step >= self.n_steps or not is_patient
        self._save(trainer)
        if self._is_terminated(trainer):
            self.watchdog.end()

    def describe_kept(self) -> str | None:
        """Describe the saved state of an interrupted run."""
        if self.saved_step == 0:
            return None
        return f"the state of step {self.saved_step} is kept in {self.folder.path}; {RESUME}"

    def _log(self, trainer: pl.Trainer, is_validation: bool) -> None:
        metrics = trainer.callback_metrics.items()
        chosen = {n: v for n, v in metrics if n == "epoch" or n.startswith("validation_") == is_validation}
        self.metrics.append(trainer.global_step, chosen)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder.last)
        self.saved_step = trainer.global_step

    def _is_terminated(self, trainer: pl.Trainer) -> bool:
        """Whether any process has received a signal, such as a scheduler sends some seconds before it kills."""
        return trainer.strategy.reduce_boolean_decision(self.watchdog.received is not None, all=False)
