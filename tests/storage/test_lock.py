"""Run locks exclude concurrent runs and name the holder."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from transcriptformer.errors import UsageError
from transcriptformer.storage.lock import RunLock

FORK = multiprocessing.get_context("fork")

HOLD = """
import sys, time
from pathlib import Path
from transcriptformer.storage.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire(Path(sys.argv[1]).parent)
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def held_by_another(path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_running_process_is_named_immediately(tmp_path: Path) -> None:
    with held_by_another(tmp_path / "lock") as process:
        started = time.monotonic()
        who = rf"\(process {process.pid} on {re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\)"
        with pytest.raises(UsageError, match=rf"out: in use by another run {who}; wait for it to finish"):
            RunLock(tmp_path / "lock").acquire(tmp_path / "out")
        assert time.monotonic() - started < 5


def test_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    with held_by_another(tmp_path / "lock") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        lock = RunLock(tmp_path / "lock")
        lock.acquire(tmp_path)
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "lock")
    lock.acquire(tmp_path)
    child = FORK.Process(target=time.sleep, args=(60,))
    child.start()
    lock.release()
    again = RunLock(tmp_path / "lock")
    again.acquire(tmp_path)
    again.release()
    child.kill()


def _count_acquisitions(path: Path, ready: Event) -> None:
    ready.wait()
    n_held = 0
    until = time.monotonic() + 3
    while time.monotonic() < until:
        lock = RunLock(path)
        try:
            lock.acquire(path.parent)
        except UsageError:
            continue
        mark = path.with_name("mark")
        descriptor = os.open(mark, os.O_CREAT | os.O_EXCL)  # fails if another process holds the lock
        os.close(descriptor)
        mark.unlink()
        lock.release()
        n_held += 1
    os._exit(0 if n_held else 1)


def test_only_one_of_many_processes_holds_the_lock(tmp_path: Path) -> None:
    ready = FORK.Event()
    processes = [FORK.Process(target=_count_acquisitions, args=(tmp_path / "lock", ready)) for _ in range(4)]
    for process in processes:
        process.start()
    ready.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert list(tmp_path.iterdir()) == []
