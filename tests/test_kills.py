"""Kill or signal the processes of a run at any moment: all end, one line reports it, and nothing is lost.

`TRANSCRIPTFORMER_KILL_ROUNDS` is the number of rounds per kind of run and signal; a round takes ten to twenty seconds
(`make test-kills`: 50 rounds of each).
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import anndata
import psutil
import pytest

from tests.commands import COMMAND, assert_same, default_signals, inference_command, read_result
from tests.h5ad_files import random_adata
from tests.training.training_runs import GENE_FILE, SMALL, assert_same_run, write_cells

ROUNDS = int(os.environ.get("TRANSCRIPTFORMER_KILL_ROUNDS", "1"))

END_TIMEOUT = 10.0

N_CELLS = 2000

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

END_MESSAGE = re.compile(r"(ERROR: |INFO: (ended by|interrupted))")


@dataclass
class Run:
    """A command that is restarted until it is complete.

    Attributes
    ----------
    folder
        Output folder.
    command
        Command line with `--resume`, which has no effect on the first start.
    compare
        Fails unless the output equals that of an uninterrupted run.
    result
        Path in the output folder that exists once the run is complete.
    """

    folder: Path
    command: list[str]
    compare: Callable[[Path], None]
    result: str
    counts: Counter[str] = field(default_factory=Counter)

    def start(self) -> subprocess.Popen[bytes]:
        self.log = self.folder.parent / f"{self.folder.name}.log"
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self.command,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
                preexec_fn=default_signals,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def is_computing(self) -> bool:
        return any(re.search("are in the vocabulary|training and .* validation cells", line) for line in self.lines)

    def complete(self) -> None:
        """Run to the end and compare the result with that of an uninterrupted run."""
        process = self.start()
        assert process.wait(300) == 0, self.lines
        self.compare(self.folder)
        self.counts["compared"] += 1
        shutil.rmtree(self.folder)


def members(group: int) -> list[psutil.Process]:
    """Running processes of a group, oldest first."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return sorted(found, key=lambda process: process.pid)


def handles_signals(process: subprocess.Popen[bytes]) -> bool:
    """Whether the command has installed its SIGTERM handler."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"SigCgt:\s*(\w+)", status)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def ranks_and_workers(main: int) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Compute processes and data workers of a run."""
    ranks: list[psutil.Process] = []
    workers: list[psutil.Process] = []
    for process in members(main):
        try:
            is_child_of_main = process.pid == main or process.ppid() == main
            is_rank = is_child_of_main and (process.pid == main or "LOCAL_RANK" in process.environ())
            (ranks if is_rank and process.cmdline() else workers).append(process)
        except psutil.NoSuchProcess:
            continue
    return ranks, workers


def assert_ended(run: Run, process: subprocess.Popen[bytes], main_was_killed: bool) -> None:
    """No process is left after ten seconds, and one line says why and how to resume."""
    until = time.monotonic() + END_TIMEOUT
    while members(process.pid) and time.monotonic() < until:
        process.poll()
        time.sleep(0.05)
    left = [(member.pid, member.cmdline()) for member in members(process.pid)]
    for member in members(process.pid):
        member.kill()
    code = process.wait(10)
    assert left == [], run.lines
    if (run.folder / run.result).exists():  # complete: the signal arrived during interpreter shutdown
        run.counts["finished before"] += 1
        return
    assert all(re.match("(INFO|WARNING|ERROR): ", line) for line in run.lines), run.lines
    messages = [line for line in run.lines if END_MESSAGE.match(line)]
    if main_was_killed:
        assert code == -signal.SIGKILL
        assert len(messages) <= 1, run.lines
    else:
        assert code in (1, 129, 130, 143), (code, run.lines)
        assert len(messages) == 1, run.lines
        assert messages[0].endswith("rerun the same command with --resume to continue")
    run.counts["ended"] += 1


def strike(run: Run, sent: signal.Signals, rng: random.Random) -> None:
    """Start or resume the run, and send a signal to some of its processes at a random moment."""
    process = run.start()
    if rng.random() < 0.25:
        wait_until(lambda: handles_signals(process), process)
        time.sleep(rng.uniform(0, 5))
    else:
        wait_until(run.is_computing, process)
        time.sleep(rng.uniform(0, 3))
    ranks, workers = ranks_and_workers(process.pid)
    if not ranks:
        assert_ended(run, process, main_was_killed=False)
        return
    targets = {"group": [*ranks, *workers], "main": ranks[:1]}
    if len(ranks) > 1:
        targets["last"] = ranks[-1:]
    if workers:
        targets["worker"] = [rng.choice(workers)]
    target = rng.choice(list(targets))
    for victim in targets[target]:
        if victim.is_running():
            victim.send_signal(sent)
    if target == "worker" and sent != signal.SIGKILL:  # ignored by workers
        process.wait(120)
    run.counts[target] += 1
    assert_ended(run, process, sent == signal.SIGKILL and target in ("group", "main") and process.wait(10) < 0)


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Create runs of `inference`."""
    folder = tmp_path_factory.mktemp("embedding")
    random_adata(N_CELLS, density=0.4).write_h5ad(folder / "cells.h5ad")
    fixed = ["--data-file", folder / "cells.h5ad", "--batch-size", 1]
    fixed += ["--config-override", "model.data_config.block_size=50"]

    @cache
    def uninterrupted() -> anndata.AnnData:
        subprocess.run(inference_command(*fixed, "--output-path", folder), check=True, capture_output=True)
        return read_result(folder / "embeddings.h5ad")

    def compare(output: Path) -> None:
        assert [path.name for path in output.iterdir()] == ["embeddings.h5ad"]
        assert_same(read_result(output / "embeddings.h5ad"), uninterrupted())

    def make(output: Path, n_processes: int, n_workers: int) -> Run:
        options = ["--num-gpus", n_processes, "--n-data-workers", n_workers, "--output-path", output, "--resume"]
        return Run(output, inference_command(*fixed, *options), compare, "embeddings.h5ad")

    return make


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Create runs of `train`."""
    folder = tmp_path_factory.mktemp("training")
    cells = write_cells(folder / "cells.h5ad")
    settings = {**SMALL, "training.save_every": 3, "training.max_epochs": 60}
    settings["model.model_config.mu_link_fn"] = "softplus"  # so that every weight has a gradient
    fixed = [str(COMMAND), "train", "--protein-embedding", str(GENE_FILE), "--data-file", str(cells)]
    fixed += [part for key, value in settings.items() for part in ("--config-override", f"{key}={value}")]

    def command(output: Path, n_processes: int, n_workers: int) -> list[str]:
        spread = ["--num-gpus", str(n_processes), "--n-data-workers", str(n_workers)]
        return [*fixed, *spread, "--output-path", str(output)]

    @cache
    def uninterrupted(n_processes: int) -> Path:
        output = folder / f"uninterrupted-{n_processes}"
        subprocess.run(command(output, n_processes, 0), check=True, capture_output=True)
        return output

    def make(output: Path, n_processes: int, n_workers: int) -> Run:
        resumed = [*command(output, n_processes, n_workers), "--resume"]
        return Run(
            output, resumed, lambda done: assert_same_run(done, uninterrupted(n_processes)), "checkpoint/config.json"
        )

    return make


@pytest.mark.slow
@pytest.mark.parametrize("sent", SIGNALS, ids=lambda sent: sent.name)
@pytest.mark.parametrize(
    ("kind", "n_processes", "n_workers"),
    [
        *(("embedding", n_processes, n_workers) for n_processes in (1, 2) for n_workers in (0, 2)),
        ("training", 1, 0),
        ("training", 2, 2),
    ],
)
def test_signals_at_random_moments(
    kind: str,
    n_processes: int,
    n_workers: int,
    sent: signal.Signals,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = request.getfixturevalue(kind)(tmp_path / "out", n_processes, n_workers)
    rng, started = random.Random(f"{kind} {n_processes} {n_workers} {sent}"), time.monotonic()
    for _ in range(ROUNDS):
        strike(run, sent, rng)
        if run.counts["finished before"] > run.counts["compared"]:
            run.complete()
    run.complete()
    with capsys.disabled():
        seconds = (time.monotonic() - started) / ROUNDS
        summary = ", ".join(f"{name}: {n}" for name, n in sorted(run.counts.items()))
        print(f"\n{kind}, {n_processes} × {n_workers}, {sent.name}: {ROUNDS} rounds of {seconds:.1f} s; {summary}")  # noqa: T201


@pytest.mark.parametrize(
    "target", [*(pytest.param(rank, marks=pytest.mark.slow) for rank in ("main", "last")), "worker"]
)
def test_killed_process_ends_the_others(target: str, embedding: Callable[..., Run], tmp_path: Path) -> None:
    run = embedding(tmp_path / "out", 2, 2)
    process = run.start()
    wait_until(lambda: run.is_computing() and len(ranks_and_workers(process.pid)[1]) >= 4, process)
    ranks, workers = ranks_and_workers(process.pid)
    victim = {"main": ranks[0], "last": ranks[-1], "worker": workers[-1]}[target]
    victim.kill()
    assert_ended(run, process, main_was_killed=target == "main")
    expected = {
        "main": "the first process of this run was killed",
        "last": f"process 1 of 2 ({victim.pid}) was ended by SIGKILL",
        "worker": f"a data worker (process {victim.pid}) was ended by SIGKILL; reduce --n-data-workers",
    }
    assert any(expected[target] in line for line in run.lines), run.lines
