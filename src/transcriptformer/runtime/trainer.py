"""Lightning's Trainer in several processes, without its log output, and with plain errors."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy

from transcriptformer.errors import TranscriptFormerError
from transcriptformer.runtime.processes import PROCESS_GROUP_TIMEOUT, Processes, translate_failure
from transcriptformer.runtime.watchdog import Watchdog

_TEARDOWN_FAILED = "Please call `iter(combined_loader)` first"
"""Lightning's message if an epoch is interrupted before its first batch."""


def trainer_options(processes: Processes, watchdog: Watchdog, backend: str) -> dict[str, Any]:
    """Return arguments of a Trainer that runs in these processes.

    Parameters
    ----------
    watchdog
        Connected to the other processes, if there are any.
    backend
        torch.distributed backend.
    """
    environment = PlannedEnvironment(processes)
    options: dict[str, Any] = {"devices": processes.per_node, "num_nodes": processes.n_nodes}
    if processes.total == 1:
        return {**options, "plugins": [environment]}
    strategy = WatchedDDP(
        watchdog, cluster_environment=environment, process_group_backend=backend, timeout=PROCESS_GROUP_TIMEOUT
    )
    return {**options, "strategy": strategy, "use_distributed_sampler": False}


class PlannedEnvironment(ClusterEnvironment):
    """Planned processes, as Lightning asks for them.

    Lightning does not start them: it would silently kill all of them when one ends.
    """

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes

    @property
    def creates_processes_externally(self) -> bool:  # noqa: D102
        return True

    @property
    def main_address(self) -> str:  # noqa: D102
        return self.processes.address

    @property
    def main_port(self) -> int:  # noqa: D102
        return self.processes.port

    @staticmethod
    def detect() -> bool:  # noqa: D102
        return False

    def world_size(self) -> int:  # noqa: D102
        return self.processes.total

    def set_world_size(self, size: int) -> None:
        """Do nothing: the number of processes is planned."""

    def global_rank(self) -> int:  # noqa: D102
        return self.processes.rank

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: ranks are planned."""

    def local_rank(self) -> int:  # noqa: D102
        return self.processes.local_rank

    def node_rank(self) -> int:  # noqa: D102
        return self.processes.node


class WatchedDDP(DDPStrategy):
    """DDP whose processes detect when one of them ends, even while computing."""

    def __init__(self, watchdog: Watchdog, cluster_environment: PlannedEnvironment, **options: Any) -> None:
        super().__init__(cluster_environment=cluster_environment, **options)
        self.watchdog, self.address = watchdog, cluster_environment.processes.link_address

    def setup_environment(self) -> None:
        """Set up DDP and connect the processes."""
        super().setup_environment()
        self.watchdog.links.connect(self.global_rank, self.world_size, self.broadcast, self.address)


@contextmanager
def plain_lightning(trainer: pl.Trainer) -> Iterator[None]:
    """Run a Trainer quietly and restore the errors that Lightning and PyTorch wrap.

    Raises
    ------
    KeyboardInterrupt
        On Ctrl-C.
    TranscriptFormerError
        If this process or a worker raised it, or if a worker or another process has ended.
    """
    try:
        with quiet_lightning():
            yield
    except BaseException as raised:
        error = _before_teardown(raised)
        if type(error) is SystemExit and trainer.interrupted:  # Ctrl-C, which would end a notebook's kernel
            raise KeyboardInterrupt from None
        translated = translate_failure(error)
        if translated is not error:
            raise translated from (None if isinstance(error, TranscriptFormerError) else error)
        if error is raised:
            raise
        raise error from error.__cause__  # not from the error that hid it


def _before_teardown(error: BaseException) -> BaseException:
    """Return the error that ended the Trainer, which a failed teardown may hide."""
    while _TEARDOWN_FAILED in str(error) and error.__context__ is not None:
        error = error.__context__
    return error


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's messages about unused hardware, its other products and its own imports."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [lightning_logger.level for lightning_logger in loggers]
    for lightning_logger in loggers:
        lightning_logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        for lightning_logger, level in zip(loggers, levels, strict=True):
            lightning_logger.setLevel(level)
