"""Several processes: how many there are, who starts them, and how they notice that one has ended."""

import datetime
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy

from transcriptformer.config import ComputeConfig
from transcriptformer.runtime.device import count_devices
from transcriptformer.runtime.parents import LAUNCHED_BY, end_with
from transcriptformer.runtime.signals import RESUME
from transcriptformer.runtime.watchdog import Watchdog

logger = logging.getLogger(__name__)

PATIENCE = datetime.timedelta(days=30)
"""How long a process waits for the others, which may have more to do."""


@dataclass(frozen=True)
class Processes:
    """How a run is spread.

    Attributes
    ----------
    per_node, n_nodes
        Processes on each machine, and machines.
    environment
        Of torchrun, SLURM, or none of these.
    launches
        Whether this process starts the others on its machine.
    """

    per_node: int
    n_nodes: int
    environment: ClusterEnvironment
    launches: bool = False

    @property
    def total(self) -> int:
        """Processes on all machines."""
        return self.per_node * self.n_nodes

    @property
    def rank(self) -> int:
        """Which of all processes this is."""
        return self.environment.node_rank() * self.per_node + self.environment.local_rank()

    def watchdog(self) -> Watchdog:
        """Return what ends this process together with the others."""
        return Watchdog(self.rank, self.total)

    def launch(self) -> dict[int, subprocess.Popen[bytes]]:
        """Start the other processes on this machine, unless somebody else does: the same command; by rank."""
        if not self.launches:
            return {}
        env = {
            **os.environ,
            "MASTER_ADDR": self.environment.main_address,
            "MASTER_PORT": str(self.environment.main_port),
            "NODE_RANK": str(self.environment.node_rank()),
            "WORLD_SIZE": str(self.total),
            LAUNCHED_BY: str(os.getpid()),
        }
        return {
            self.rank + i: subprocess.Popen(_this_command(), env={**env, "LOCAL_RANK": str(i)})
            for i in range(1, self.per_node)
        }

    def trainer_options(self, watchdog: Watchdog | None = None, backend: str | None = "gloo") -> dict[str, Any]:
        """Arguments of a Trainer.

        Parameters
        ----------
        watchdog
            Is told of the other processes, if there are any.
        backend
            How processes speak to each other; where they only wait for each other, gloo does on every kind of device.
            None: as is fastest on the device.
        """
        options: dict[str, Any] = {"devices": self.per_node, "num_nodes": self.n_nodes}
        if self.total == 1:
            return {**options, "plugins": [self.environment]}
        assert watchdog is not None
        strategy = WatchedDDP(
            watchdog, cluster_environment=self.environment, process_group_backend=backend, timeout=PATIENCE
        )
        return {**options, "strategy": strategy, "use_distributed_sampler": False}


class LaunchedEnvironment(LightningEnvironment):
    """Processes that the first one on each machine starts.

    Lightning starts none: it would kill all of them without a word when one has ended.
    """

    @property
    def creates_processes_externally(self) -> bool:
        """That is, not by Lightning."""
        return True


class WatchedDDP(DDPStrategy):
    """DDP whose processes notice when one of them has ended, also while they compute."""

    def __init__(self, watchdog: Watchdog, **options: Any) -> None:
        super().__init__(**options)
        self.watchdog = watchdog

    def setup_environment(self) -> None:
        """Connect the processes."""
        super().setup_environment()
        assert self.cluster_environment is not None
        host = "127.0.0.1" if self.num_nodes == 1 else self.cluster_environment.main_address
        self.watchdog.links.connect(self.global_rank, self.world_size, self.broadcast, host)


def _this_command() -> list[str]:
    """Command line of this process."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    started = [str(Path(sys.argv[0]).absolute())] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return [sys.executable, *started, *sys.argv[1:]]


def plan_processes(wanted: ComputeConfig, device: torch.device) -> Processes:
    """Follow torchrun or SLURM where they have started the processes; otherwise as the options say."""
    if TorchElasticEnvironment.detect():
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        n_nodes = int(os.environ["WORLD_SIZE"]) // per_node
        if (wanted.num_gpus, wanted.num_nodes) not in ((1, 1), (per_node, n_nodes)):
            logger.warning("torchrun has started %d processes on each of %d machines; so be it", per_node, n_nodes)
        is_speaker = os.environ["LOCAL_RANK"] == "0"
        end_with(os.getppid(), f"ERROR: torchrun was killed; {RESUME}" if is_speaker else "")
        return Processes(per_node, n_nodes, TorchElasticEnvironment())
    per_node = count_devices(device, wanted.num_gpus)
    total = per_node * wanted.num_nodes
    if total > 1 and SLURMEnvironment.detect() and os.environ.get("SLURM_NTASKS") == str(total):
        return Processes(per_node, wanted.num_nodes, SLURMEnvironment(auto_requeue=False))
    # Also where a cluster's scheduler has started several tasks, each of which is a run of its own.
    return Processes(per_node, wanted.num_nodes, LaunchedEnvironment(), launches="LOCAL_RANK" not in os.environ)
