"""Several processes: who starts them, and how many there are."""

import datetime
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy

from transcriptformer.config import InferenceConfig
from transcriptformer.device import count_devices
from transcriptformer.train_config import TrainingConfig

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
        Who starts them: torchrun, SLURM, or Lightning itself.
    """

    per_node: int
    n_nodes: int
    environment: ClusterEnvironment

    @property
    def total(self) -> int:
        """Processes on all machines."""
        return self.per_node * self.n_nodes

    def trainer_options(self, backend: str | None = "gloo") -> dict[str, Any]:
        """Arguments of a Trainer.

        Parameters
        ----------
        backend
            How processes speak to each other; where they only wait for each other, gloo does on every kind of device.
            None: as is fastest on the device.
        """
        options: dict[str, Any] = {"devices": self.per_node, "num_nodes": self.n_nodes}
        if self.total == 1:
            return {**options, "plugins": [self.environment]}
        strategy = DDPStrategy(cluster_environment=self.environment, process_group_backend=backend, timeout=PATIENCE)
        return {**options, "strategy": strategy, "use_distributed_sampler": False}


def plan_processes(wanted: InferenceConfig | TrainingConfig, device: torch.device) -> Processes:
    """Follow torchrun or SLURM where they have started the processes; otherwise as the options say."""
    if TorchElasticEnvironment.detect():
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        n_nodes = int(os.environ["WORLD_SIZE"]) // per_node
        if (wanted.num_gpus, wanted.num_nodes) not in ((1, 1), (per_node, n_nodes)):
            logger.warning("torchrun has started %d processes on each of %d machines; so be it", per_node, n_nodes)
        return Processes(per_node, n_nodes, TorchElasticEnvironment())
    per_node = count_devices(device, wanted.num_gpus)
    total = per_node * wanted.num_nodes
    if total > 1 and SLURMEnvironment.detect() and os.environ.get("SLURM_NTASKS") == str(total):
        return Processes(per_node, wanted.num_nodes, SLURMEnvironment(auto_requeue=False))
    # Also where a cluster's scheduler has started several tasks, each of which is a run of its own.
    return Processes(per_node, wanted.num_nodes, LightningEnvironment())
