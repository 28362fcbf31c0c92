"""Errors come out of Lightning's Trainer as they were raised."""

import signal
from collections.abc import Iterator

import pytest
import pytorch_lightning as pl
import torch

from transcriptformer.errors import TrainingError
from transcriptformer.runtime.signals import TerminatedError
from transcriptformer.runtime.trainer import plain_lightning, quiet_lightning
from transcriptformer.runtime.watchdog import ProcessEndedError


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Interrupted:
    """Batches during whose start something is raised, as where data workers are forked."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.was_checked = error, False

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self.was_checked:
            raise self.error
        self.was_checked = True  # Lightning first looks whether this can be iterated over
        return iter([])


def fit(error: BaseException) -> None:
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
    before = signal.getsignal(signal.SIGINT)
    try:
        with plain_lightning(trainer):
            trainer.fit(Model(), Interrupted(error))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_worker_that_is_killed_at_the_start_of_an_epoch_is_named() -> None:
    with pytest.raises(ProcessEndedError, match=r"data worker \(process 7\) was killed"):
        fit(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), TerminatedError(signal.SIGTERM), TrainingError("no"), RuntimeError("odd")],
    ids=lambda error: type(error).__name__,
)
def test_what_interrupts_the_start_of_an_epoch_is_what_is_raised(error: BaseException) -> None:
    error.__cause__ = OSError("why")
    with pytest.raises(type(error)) as raised:
        fit(error)
    if not isinstance(error, KeyboardInterrupt):  # of which Lightning makes another exception
        assert raised.value is error
        assert str(error.__cause__) == "why"
