"""Runs with several processes, however started, write the same result as one process."""

import re
import socket
import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.commands import assert_same, finish, inference_command, read_result, run_command, start
from tests.golden_cases import CELLS
from tests.h5ad_files import random_adata
from transcriptformer.cli.main import app
from transcriptformer.config import ComputeConfig
from transcriptformer.data.metadata import ColumnError
from transcriptformer.errors import DataError
from transcriptformer.runtime.processes import Processes, plan_processes, translated_failures
from transcriptformer.runtime.watchdog import ProcessEndedError


@pytest.fixture
def cells(tmp_path: Path) -> list[Path]:
    """Two inputs of some hundred cells, one h5ad and one zarr store."""
    for seed, name in enumerate(("first.h5ad", "second.zarr")):
        adata = random_adata(150 + 50 * seed, n_genes=180, density=0.1 + 0.5 * seed, seed=seed)
        adata.obs_names = [f"{name}-{cell}" for cell in adata.obs_names]
        adata.obs["donor"] = np.where(np.arange(adata.n_obs) % 3, "A", "B")
        adata.strings_to_categoricals()
        getattr(adata, f"write_{name.partition('.')[2]}")(tmp_path / name)
    return [tmp_path / "first.h5ad", tmp_path / "second.zarr"]


def options_for(cells: list[Path], folder: Path) -> list[object]:
    files = [part for path in cells for part in ("--data-file", path)]
    return [*files, "--output-path", folder, "--config-override", "model.data_config.block_size=20"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def one_process(*options: object) -> anndata.AnnData:
    """Run `inference` in one process and return its result."""
    done = CliRunner().invoke(app, inference_command(*options)[1:])
    assert done.exit_code == 0, done.output
    return read_whole(Path(str(options[options.index("--output-path") + 1])))


def read_whole(folder: Path) -> anndata.AnnData:
    assert [path.name for path in folder.iterdir()] == ["embeddings.h5ad"]
    return read_result(folder / "embeddings.h5ad")


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--emb-type", "cge"), marks=pytest.mark.slow),
        pytest.param(("--emb-type", "cge", "--cge-pool", "donor"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default")
def test_two_processes_match_one(options: tuple[str, ...], cells: list[Path], tmp_path: Path) -> None:
    done = run_command(*options_for(cells, tmp_path / "two"), "--num-gpus", 2, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stderr.count("350 cells") == 1
    assert_same(read_whole(tmp_path / "two"), one_process(*options_for(cells, tmp_path / "one"), *options))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default")
def test_torchrun_on_two_machines_matches_one_process(cells: list[Path], tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", free_port(), "--no-python"]
    machines = []
    for rank in range(2):
        command = inference_command(*options_for(cells, tmp_path / "two"))
        machines.append(start([*launcher[:-1], "--node-rank", str(rank), *launcher[-1:], *command]))
    done = [finish(machine) for machine in machines]
    assert [machine.returncode for machine in done] == [0, 0], done
    assert "".join(machine.stdout for machine in done).count("350 cells: ") == 1
    assert_same(read_whole(tmp_path / "two"), one_process(*options_for(cells, tmp_path / "one")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default")
@pytest.mark.parametrize("n_nodes", [1, 2])
def test_slurm_tasks_match_one_process(n_nodes: int, cells: list[Path], tmp_path: Path) -> None:
    port, tasks = free_port(), []
    for rank in range(2):
        env = {
            **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "run", "SLURM_NODELIST": "localhost"},
            **{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": str(2 // n_nodes), "SLURM_NNODES": str(n_nodes)},
            **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % (2 // n_nodes))},
            **{"SLURM_NODEID": str(rank if n_nodes == 2 else 0), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        }
        spread = ["--num-gpus", 2 // n_nodes, "--num-nodes", n_nodes]
        tasks.append(start(inference_command(*options_for(cells, tmp_path / "two"), *spread), env))
    done = [finish(task) for task in tasks]
    assert [task.returncode for task in done] == [0, 0], done
    assert_same(read_whole(tmp_path / "two"), one_process(*options_for(cells, tmp_path / "one")))


def test_bad_data_ends_all_processes_with_one_line(tmp_path: Path) -> None:
    adata = random_adata(40)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        file["X/data"][-1] = -3
    options = ["--data-file", tmp_path / "cells.h5ad", "--output-path", tmp_path / "out", "--num-gpus", 2]
    done = run_command(*options)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 1
    assert re.search("counts are negative", errors[0])
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_missing_gpus_are_refused(tmp_path: Path) -> None:
    options = ["--data-file", CELLS, "--output-path", tmp_path, "--device", "cuda", "--num-gpus", 2]
    command = inference_command(*options)
    done = CliRunner().invoke(app, command[1:])
    assert done.exit_code == 2
    assert done.stderr == "ERROR: --device cuda: not available; available devices: cpu\n"


def test_lost_connection_means_another_process_ended() -> None:
    said = "another process of this run has ended; .* with --resume to continue"
    with pytest.raises(ProcessEndedError, match=said), translated_failures():
        raise torch.distributed.DistNetworkError("Failed to recv, got 0 bytes")


@pytest.mark.parametrize("kind", [DataError, ColumnError])
def test_errors_of_data_workers_lose_their_traceback(kind: type[DataError]) -> None:
    """PyTorch puts the worker's traceback before the message."""
    told = (
        f"Caught {kind.__name__} in DataLoader worker process 0.\nOriginal Traceback:\n x\n{kind.__name__}: cells: no\n"
    )
    with pytest.raises(kind, match=r"^cells: no$"), translated_failures():
        raise kind(told)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu[03-05,07],cpu1", "gpu03"),
        ("gpu7", "gpu7"),
        ("node-1,node-2", "node-1"),
        ("a[1,4]", "a1"),
        ("", "127.0.0.1"),
    ],
)
def test_slurm_processes_meet_at_the_first_host(hosts: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"JOB_ID": "1234567", "JOB_NAME": "run", "NODELIST": hosts, "NTASKS": "4"}
    place = {"PROCID": "3", "LOCALID": "1", "NODEID": "1"}
    for name, value in (job | place).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    wanted = ComputeConfig(num_gpus=2, num_nodes=2)
    planned = plan_processes(wanted, torch.device("cpu"))
    assert planned == Processes(2, 2, 1, 1, first, 19_567)
    assert planned.rank == 3


def test_an_interactive_slurm_shell_is_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_NAME": "bash", "NTASKS": "2", "PROCID": "1", "LOCALID": "1", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    planned = plan_processes(ComputeConfig(num_gpus=2), torch.device("cpu"))
    assert planned.launches
    assert planned.rank == 0
