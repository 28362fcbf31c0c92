"""Multi-process runs: plan and launch processes, and detect when one ends."""

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
from transcriptformer.runtime.parents import LAUNCHED_BY, exit_with_parent
from transcriptformer.runtime.signals import RESUME
from transcriptformer.runtime.watchdog import Watchdog

logger = logging.getLogger(__name__)

PROCESS_GROUP_TIMEOUT = datetime.timedelta(days=30)
"""Maximum time that a finished process waits for the others."""


@dataclass(frozen=True)
class Processes:
    """Processes of a run.

    Attributes
    ----------
    per_node, n_nodes
        Processes per machine, and number of machines.
    environment
        Environment of torchrun, SLURM or `LaunchedEnvironment`.
    launches
        Whether this process starts the others on its machine.
    """

    per_node: int
    n_nodes: int
    environment: ClusterEnvironment
    launches: bool = False

    @property
    def total(self) -> int:
        """Number of processes on all machines."""
        return self.per_node * self.n_nodes

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self.environment.node_rank() * self.per_node + self.environment.local_rank()

    def watchdog(self) -> Watchdog:
        """Return a watchdog that ends this process together with the others."""
        return Watchdog(self.rank, self.total)

    def launch(self) -> dict[int, subprocess.Popen[bytes]]:
        """Start the other processes of this machine with the same command, if this process `launches`; by rank."""
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
        """Return arguments of a Trainer.

        Parameters
        ----------
        watchdog
            Connected to the other processes, if there are any.
        backend
            torch.distributed backend; gloo works on every device and suffices for barriers. None: the fastest one for
            the device.
        """
        options: dict[str, Any] = {"devices": self.per_node, "num_nodes": self.n_nodes}
        if self.total == 1:
            return {**options, "plugins": [self.environment]}
        assert watchdog is not None
        strategy = WatchedDDP(
            watchdog, cluster_environment=self.environment, process_group_backend=backend, timeout=PROCESS_GROUP_TIMEOUT
        )
        return {**options, "strategy": strategy, "use_distributed_sampler": False}


class LaunchedEnvironment(LightningEnvironment):
    """Environment whose processes are started by the first one on each machine.

    Lightning does not start them: it would silently kill all of them when one ends.
    """

    @property
    def creates_processes_externally(self) -> bool:
        """Always True: Lightning creates no processes."""
        return True


class WatchedDDP(DDPStrategy):
    """DDP whose processes detect when one of them ends, even while computing."""

    def __init__(self, watchdog: Watchdog, **options: Any) -> None:
        super().__init__(**options)
        self.watchdog = watchdog

    def setup_environment(self) -> None:
        """Set up DDP and connect the processes."""
        super().setup_environment()
        assert self.cluster_environment is not None
        host = "127.0.0.1" if self.num_nodes == 1 else self.cluster_environment.main_address
        self.watchdog.links.connect(self.global_rank, self.world_size, self.broadcast, host)


def _this_command() -> list[str]:
    """Return the command line of this process."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    started = [str(Path(sys.argv[0]).absolute())] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return [sys.executable, *started, *sys.argv[1:]]


def plan_processes(wanted: ComputeConfig, device: torch.device) -> Processes:
    """Plan the processes: as started by torchrun or SLURM, otherwise as configured."""
    if TorchElasticEnvironment.detect():
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        n_nodes = int(os.environ["WORLD_SIZE"]) // per_node
        if (wanted.num_gpus, wanted.num_nodes) not in ((1, 1), (per_node, n_nodes)):
            logger.warning(
                "ignoring --num-gpus %d and --num-nodes %d: torchrun started %d processes on each of %d machines",
                *(wanted.num_gpus, wanted.num_nodes, per_node, n_nodes),
            )
        is_reporter = os.environ["LOCAL_RANK"] == "0"
        exit_with_parent(os.getppid(), f"ERROR: torchrun was killed; {RESUME}" if is_reporter else "")
        return Processes(per_node, n_nodes, TorchElasticEnvironment())
    per_node = count_devices(device, wanted.num_gpus)
    total = per_node * wanted.num_nodes
    if total > 1 and SLURMEnvironment.detect() and os.environ.get("SLURM_NTASKS") == str(total):
        return Processes(per_node, wanted.num_nodes, SLURMEnvironment(auto_requeue=False))
    # Also if a scheduler started several tasks, each of which is its own run.
    return Processes(per_node, wanted.num_nodes, LaunchedEnvironment(), launches="LOCAL_RANK" not in os.environ)
