"""Multi-process runs: plan, launch and connect processes, and detect when one ends."""

import datetime
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transcriptformer.config import ComputeConfig
from transcriptformer.errors import TranscriptFormerError
from transcriptformer.runtime.device import count_devices
from transcriptformer.runtime.parents import LAUNCHED_BY, exit_with_parent, lost_worker_message
from transcriptformer.runtime.signals import RESUME
from transcriptformer.runtime.watchdog import ProcessEndedError, Watchdog

logger = logging.getLogger(__name__)

PROCESS_GROUP_TIMEOUT = datetime.timedelta(days=30)
"""Maximum time that a finished process waits for the others."""

LOOPBACK = "127.0.0.1"

_LOST_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:exited unexpectedly|is killed)")
"""PyTorch's messages about dead data workers."""


@dataclass(frozen=True)
class Processes:
    """Processes of a run, and the place of this one among them.

    Attributes
    ----------
    per_node, n_nodes
        Processes per machine, and number of machines.
    node, local_rank
        Index of this machine, and of this process on it.
    address, port
        Where the first process listens.
    launches
        Whether this process starts the others on its machine.
    """

    per_node: int = 1
    n_nodes: int = 1
    node: int = 0
    local_rank: int = 0
    address: str = LOOPBACK
    port: int = 0
    launches: bool = False

    @property
    def total(self) -> int:
        """Number of processes on all machines."""
        return self.per_node * self.n_nodes

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self.node * self.per_node + self.local_rank

    @property
    def is_first(self) -> bool:
        """Whether this process logs, and writes the result."""
        return self.rank == 0

    @property
    def link_address(self) -> str:
        """Address of the first process for `Links`: loopback on a single machine."""
        return LOOPBACK if self.n_nodes == 1 else self.address

    def watchdog(self) -> Watchdog:
        """Return a watchdog that ends this process together with the others."""
        return Watchdog(self.rank, self.total)

    def launch(self) -> dict[int, subprocess.Popen[bytes]]:
        """Start the other processes of this machine with the same command, if this process `launches`; by rank."""
        if not self.launches:
            return {}
        env = {
            **os.environ,
            **self._rendezvous(),
            "NODE_RANK": str(self.node),
            "WORLD_SIZE": str(self.total),
            LAUNCHED_BY: str(os.getpid()),
        }
        return {
            self.rank + i: subprocess.Popen(_this_command(), env={**env, "LOCAL_RANK": str(i)})
            for i in range(1, self.per_node)
        }

    def own_device(self, device: torch.device) -> torch.device:
        """Return the device of this process, which becomes PyTorch's default one of its kind."""
        if device.type != "cuda" or self.total == 1:
            return device
        own = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(own)
        return own

    @contextmanager
    def connected(self, watchdog: Watchdog) -> Iterator[None]:
        """Connect the processes: for `barrier`, and to detect when one ends, even while computing."""
        if self.total == 1:
            yield
            return
        os.environ.update(self._rendezvous())
        # gloo works on every device and suffices for barriers.
        torch.distributed.init_process_group(
            "gloo", rank=self.rank, world_size=self.total, timeout=PROCESS_GROUP_TIMEOUT
        )
        watchdog.links.connect(self.rank, self.total, _broadcast, self.link_address)
        yield
        torch.distributed.destroy_process_group()  # not after an error, when others may be gone

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.total > 1:
            torch.distributed.barrier()

    def _rendezvous(self) -> dict[str, str]:
        return {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}


def _broadcast(value: Any) -> Any:
    """Return, in every process, the value of the first one."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _this_command() -> list[str]:
    """Return the command line of this process."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    started = [str(Path(sys.argv[0]).absolute())] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return [sys.executable, *started, *sys.argv[1:]]


def plan_processes(wanted: ComputeConfig, device: torch.device) -> Processes:
    """Plan the processes: as started by torchrun or SLURM, otherwise as configured."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return _torchrun(wanted, env)
    per_node = count_devices(device, wanted.num_gpus)
    total = per_node * wanted.num_nodes
    if total > 1 and _is_slurm_job(env) and env["SLURM_NTASKS"] == str(total):
        return Processes(
            per_node,
            wanted.num_nodes,
            int(env["SLURM_NODEID"]),
            int(env["SLURM_LOCALID"]),
            env.get("MASTER_ADDR", _first_host(env.get("SLURM_NODELIST", LOOPBACK))),
            int(env.get("MASTER_PORT", _port_of_job(env.get("SLURM_JOB_ID", "")))),
        )
    # Also if a scheduler started several tasks, each of which is its own run.
    return Processes(
        per_node,
        wanted.num_nodes,
        int(env.get("NODE_RANK", 0)),
        int(env.get("LOCAL_RANK", 0)),
        env.get("MASTER_ADDR", LOOPBACK),
        int(env.get("MASTER_PORT", _free_port() if total > 1 else 0)),
        launches="LOCAL_RANK" not in env,
    )


def _torchrun(wanted: ComputeConfig, env: Mapping[str, str]) -> Processes:
    per_node = int(env["LOCAL_WORLD_SIZE"])
    n_nodes = int(env["WORLD_SIZE"]) // per_node
    if (wanted.num_gpus, wanted.num_nodes) not in ((1, 1), (per_node, n_nodes)):
        logger.warning(
            "ignoring --num-gpus %d and --num-nodes %d: torchrun started %d processes on each of %d machines",
            *(wanted.num_gpus, wanted.num_nodes, per_node, n_nodes),
        )
    is_reporter = env["LOCAL_RANK"] == "0"
    exit_with_parent(os.getppid(), f"ERROR: torchrun was killed; {RESUME}" if is_reporter else "")
    node, local_rank = int(env["GROUP_RANK"]), int(env["LOCAL_RANK"])
    return Processes(per_node, n_nodes, node, local_rank, env["MASTER_ADDR"], int(env["MASTER_PORT"]))


def _is_slurm_job(env: Mapping[str, str]) -> bool:
    """Whether SLURM started this process as a task of a job, rather than an interactive shell."""
    return "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def _first_host(hosts: str) -> str:
    """Return the first host of SLURM_NODELIST, such as gpu03 for gpu[03-05,07],cpu1."""
    match = re.match(r"([^,\[\s]+)(?:\[([^,\-\]]+))?", hosts)
    return match[1] + (match[2] or "") if match else LOOPBACK


def _port_of_job(job: str) -> int:
    """Return a port that jobs on the same machine probably do not share."""
    return 15_000 + int(job[-4:]) if job[-4:].isdigit() else 12_910


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextmanager
def translated_failures() -> Iterator[None]:
    """Raise the errors of data workers, and lost workers and processes, as TranscriptFormerError.

    Raises
    ------
    TranscriptFormerError
        If a worker raised it, without the traceback that PyTorch puts before the message.
    ProcessEndedError
        If a worker or another process has ended.
    """
    try:
        yield
    except Exception as error:
        translated = translate_failure(error)
        if translated is error:
            raise
        raise translated from (None if isinstance(error, TranscriptFormerError) else error)


def translate_failure(error: BaseException) -> BaseException:
    """Return the error that `translated_failures` raises for `error`."""
    text = str(error)
    if isinstance(error, TranscriptFormerError):
        name = f"{type(error).__name__}: "
        if text.startswith("Caught ") and name in text:
            return type(error)(text.rpartition(name)[2].strip())
    elif isinstance(error, RuntimeError):
        if lost := _LOST_WORKER.search(text):
            return ProcessEndedError(lost_worker_message(lost[1]))
        is_connection = any(backend in text for backend in ("gloo", "NCCL"))
        if is_connection or isinstance(error, torch.distributed.DistError):
            return ProcessEndedError(f"another process of this run has ended; see its output; {RESUME}")
    return error
