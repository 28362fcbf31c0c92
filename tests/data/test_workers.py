"""Data workers start even if forking with other threads hangs."""

import subprocess
import sys

import pytest

PRELUDE = """
import os, time
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transcriptformer.data import workers

workers.START_TIMEOUT = 1.0
n_forks = 0

def count():
    global n_forks
    n_forks += 1

class Numbers(IterableDataset):
    def __iter__(self):
        worker = get_worker_info()
        return iter(range(worker.id, 10, worker.num_workers))

def hang_in(forks):
    "Make the children of these forks hang, as if another thread held a lock."
    os.register_at_fork(before=count, after_in_child=lambda: n_forks in forks and time.sleep(1000))
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "hanging", [(), (1, 2, 3), *(pytest.param(forks, marks=pytest.mark.slow) for forks in ((1,), (2,)))]
)
def test_workers_that_do_not_start_are_replaced(hanging: tuple[int, ...]) -> None:
    done = run(f"hang_in({hanging}); print(sorted(workers.start_workers(DataLoader(Numbers(), None, num_workers=2))))")
    assert done.stdout == "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n", done.stderr
    assert done.stderr.count("data workers did not start within") == -(-len(hanging) // 2)


def test_workers_that_never_start_are_an_error() -> None:
    impatient = "workers.START_TIMEOUT = 0.2; hang_in(range(100)); "
    done = run(impatient + "workers.start_workers(DataLoader(Numbers(), None, num_workers=2))")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("data workers cannot be started; try again with --n-data-workers 0")


def test_a_worker_killed_at_start_is_reported() -> None:
    code = """
import signal
from transcriptformer.runtime.watchdog import Watchdog
from transcriptformer.runtime.processes import translated_failures
os.register_at_fork(before=count, after_in_child=lambda: n_forks == 2 and os.kill(os.getpid(), signal.SIGKILL))
with Watchdog(), translated_failures():
    list(workers.start_workers(DataLoader(Numbers(), None, num_workers=2)))
"""
    done = run(code)
    assert done.returncode == 1
    assert "was ended by SIGKILL; reduce --n-data-workers to save memory" in done.stderr.splitlines()[-1]
    assert "did not start" not in done.stderr
