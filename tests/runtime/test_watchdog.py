"""Processes end on signals and with each other; tested with small scripts without a model."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.commands import default_signals

RESUME = "rerun the same command with --resume to continue"

PRELUDE = """
import ctypes, os, signal, subprocess, sys, time
from transcriptformer.runtime import parents, signals, watchdog
from transcriptformer.runtime.watchdog import Watchdog

watchdog.TERMINATION_TIMEOUT = 1.0

def hang():
    "Block on a lock in the C library, like a collective operation: this thread runs no more Python code."
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

def ready():
    print("ready", flush=True)

def wait():
    ready()
    time.sleep(60)

class Broadcast:
    "Broadcast from the first process to the others through a file."
    def __init__(self, path):
        self.path = path
    def __call__(self, value):
        if value is not None:
            with open(self.path + ".tmp", "w") as file:
                file.write(repr(value))
            os.rename(self.path + ".tmp", self.path)
            return value
        while not os.path.exists(self.path):
            time.sleep(0.01)
        return eval(open(self.path).read())
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a Python process with some code, and wait until it is ready."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object, wait: bool = True) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=default_signals,
        )
        started.append(process)
        if wait:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
            time.sleep(0.3)  # until it runs the next statement
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end_of(process: subprocess.Popen[str], seconds: float = 5.0) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process that must end within `seconds`."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def children_of(process: subprocess.Popen[str], n: int) -> list[psutil.Process]:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        children = psutil.Process(process.pid).children()
        if len(children) == n:
            return children
        time.sleep(0.02)
    raise AssertionError(f"there are no {n} children")


def assert_end(processes: list[psutil.Process], seconds: float = 5.0) -> None:
    assert psutil.wait_procs(processes, timeout=seconds)[1] == []


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_signal_raises_and_results_are_kept(sent: signal.Signals, code: int, start: Start) -> None:
    process = start(
        """
try:
    with Watchdog():
        wait()
except BaseException as error:
    print("kept", flush=True)
    sys.exit(130 if isinstance(error, KeyboardInterrupt) else error.code)
"""
    )
    process.send_signal(sent)
    assert end_of(process) == (code, "kept\n", "")


def test_ignored_signal_stays_ignored(start: Start) -> None:
    process = start("signal.signal(signal.SIGHUP, signal.SIG_IGN)\nwith Watchdog():\n    ready(); time.sleep(1)")
    process.send_signal(signal.SIGHUP)
    assert end_of(process) == (0, "", "")


def test_handlers_are_restored(start: Start) -> None:
    process = start(
        """
with Watchdog():
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
assert signal.set_wakeup_fd(-1) == -1
ready()
"""
    )
    assert end_of(process) == (0, "", "")


def test_hanging_process_is_flushed_and_killed(start: Start) -> None:
    process = start("with Watchdog() as dog:\n    dog.flush = lambda: print('kept', flush=True)\n    ready(); hang()")
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (143, "kept\n", f"INFO: ended by SIGTERM; {RESUME}\n")


def test_hanging_flush_does_not_block_the_exit(start: Start) -> None:
    process = start("with Watchdog() as dog:\n    dog.flush = hang\n    ready(); hang()")
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 143


def test_process_that_hangs_during_cleanup_is_killed(start: Start) -> None:
    process = start("with Watchdog():\n    try:\n        wait()\n    finally:\n        hang()")
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 143


def test_process_that_hangs_after_end_is_killed(start: Start) -> None:
    process = start("try:\n    with Watchdog():\n        wait()\nexcept SystemExit:\n    hang()")
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (143, "", "")


def test_signal_can_be_deferred(start: Start) -> None:
    process = start(
        """
with Watchdog() as dog:
    dog.is_deferred = True
    ready()
    while dog.received is None:
        time.sleep(0.01)
    time.sleep(1.5)
    print("saved", dog.received.name, flush=True)
    dog.end()
"""
    )
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (143, "saved SIGTERM\n", "")


PEER = """
rank, path = int(sys.argv[1]), sys.argv[2]
with Watchdog(rank, 3) as dog:
    dog.links.connect(rank, 3, Broadcast(path), "127.0.0.1")
    dog.flush = lambda: print("flushed", flush=True)
    ready()
"""


def peers(start: Start, folder: Path, *what: str) -> list[subprocess.Popen[str]]:
    """Start the processes of a run, each with its own code under a watchdog."""
    codes = [PEER + f"    {code}\n" for code in what]
    processes = [start(code, rank, folder / "link", wait=False) for rank, code in enumerate(codes)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    time.sleep(0.3)
    return processes


def test_killed_process_ends_the_others_and_the_first_reports_it(start: Start, tmp_path: Path) -> None:
    first, killed, other = peers(start, tmp_path, "time.sleep(60)", "time.sleep(60)", "hang()")
    killed.kill()
    code, _, err = end_of(first)
    assert code == 1
    assert err.splitlines()[-1].endswith(f"ProcessEndedError: process 1 of 3 was killed; {RESUME}")
    code, out, err = end_of(other)
    assert (code, out, err) == (1, "flushed\n", "")


def test_hanging_first_process_reports_it_too(start: Start, tmp_path: Path) -> None:
    first, killed, other = peers(start, tmp_path, "hang()", "time.sleep(60)", "time.sleep(60)")
    killed.kill()
    assert end_of(first) == (1, "flushed\n", f"ERROR: process 1 of 3 was killed; {RESUME}\n")
    assert end_of(other)[0] == 1


def test_killed_first_process_ends_the_others_and_one_reports_it(start: Start, tmp_path: Path) -> None:
    first, speaker, other = peers(start, tmp_path, "hang()", "hang()", "time.sleep(60)")
    first.kill()
    assert end_of(speaker) == (1, "", f"ERROR: the first process of this run was killed; {RESUME}\n")
    assert end_of(other) == (1, "", "")


def test_terminated_process_is_named_by_the_first(start: Start, tmp_path: Path) -> None:
    first, told, _ = peers(start, tmp_path, "time.sleep(60)", "time.sleep(60)", "time.sleep(60)")
    told.send_signal(signal.SIGTERM)
    assert end_of(told) == (143, "", "")
    assert end_of(first)[2].splitlines()[-1].endswith(f"process 1 of 3 was ended by SIGTERM; {RESUME}")


def test_reported_failure_is_not_reported_again_by_the_first(start: Start, tmp_path: Path) -> None:
    first, failed, _ = peers(start, tmp_path, "time.sleep(60)", "raise ValueError('bad cell')", "time.sleep(60)")
    assert end_of(failed)[2].splitlines()[-1] == "ValueError: bad cell"
    assert end_of(first) == (1, "", "")


def test_finished_process_does_not_end_the_others(start: Start, tmp_path: Path) -> None:
    first, done, slow = peers(start, tmp_path, "time.sleep(2)", "pass", "time.sleep(3)")
    assert [end_of(process) for process in (done, first, slow)] == [(0, "", "")] * 3


def test_unknown_connection_is_rejected(start: Start, tmp_path: Path) -> None:
    stranger = """
import socket
port, _ = Broadcast(sys.argv[2])(None)
socket.create_connection(("127.0.0.1", port)).sendall(b"GET / HTTP/1.1\\r\\nHost: somebody's scanner\\r\\n\\r\\n")
"""
    start(stranger, 0, tmp_path / "link", wait=False)
    processes = peers(start, tmp_path, "time.sleep(1)", "time.sleep(1)", "time.sleep(1)")
    assert [end_of(process) for process in processes] == [(0, "", "")] * 3


PARENT = """
imports = "import time; from transcriptformer.runtime import parents; "
child = imports + sys.argv[1] + "; print('ready', flush=True); time.sleep(60)"
environment = {**os.environ, parents.LAUNCHED_BY: str(os.getpid()), "LOCAL_RANK": "1"}
with Watchdog(0, 2) as dog:
    dog.watch_children({1: subprocess.Popen([sys.executable, "-c", child], env=environment)})
    time.sleep(60)
"""


def test_launched_process_ends_with_a_killed_launcher_and_reports_it(start: Start) -> None:
    process = start(PARENT, "parents.exit_with_launcher()")
    children = children_of(process, 1)
    process.kill()
    assert_end(children)
    assert end_of(process)[2] == f"ERROR: the first process of this run was killed; {RESUME}\n"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_launched_process_ends_with_a_terminated_launcher(sent: signal.Signals, start: Start) -> None:
    process = start(PARENT, "parents.exit_with_launcher()")
    children = children_of(process, 1)
    process.send_signal(sent)
    assert end_of(process) == (128 + sent, "", "")
    assert_end(children, 1)


def test_killed_launched_process_is_named(start: Start) -> None:
    process = start(PARENT, "pass")
    (child,) = children_of(process, 1)
    child.kill()
    last_line = end_of(process)[2].splitlines()[-1]
    assert last_line.endswith(f"ProcessEndedError: process 1 of 2 ({child.pid}) was ended by SIGKILL; {RESUME}")


WORKERS = """
import multiprocessing
def work(parent, stuck):
    parents.serve_parent(parent, started, 0)
    hang() if stuck else time.sleep(60)
context = multiprocessing.get_context("fork")
started = context.Semaphore(0)
workers = [context.Process(target=work, args=(os.getpid(), stuck), daemon=True) for stuck in (True, False)]
with Watchdog():
    for worker in workers:
        worker.start()
        parents.workers.add(worker)
    wait()
"""


def test_data_workers_end_with_their_parent(start: Start) -> None:
    process = start(WORKERS)
    workers = children_of(process, 2)
    time.sleep(0.5)
    process.kill()
    assert_end(workers, 3)


@pytest.mark.parametrize("does", ["time.sleep(60)", "hang()"])
def test_killed_data_worker_is_named(does: str, start: Start) -> None:
    process = start(WORKERS.replace("wait()", f"ready(); {does}"))
    workers = children_of(process, 2)
    time.sleep(1)
    workers[0].kill()
    code, _, err = end_of(process)
    assert code == 1
    words = f"a data worker (process {workers[0].pid}) was ended by SIGKILL; reduce --n-data-workers to save memory"
    assert err.splitlines()[-1].endswith(f"{words}; {RESUME}")
    assert_end(workers, 1)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_data_workers_ignore_signals_to_the_group(sent: signal.Signals, start: Start) -> None:
    process = start(WORKERS)
    workers = children_of(process, 2)
    time.sleep(0.5)
    for worker in workers:
        worker.send_signal(sent)
    time.sleep(1)
    assert [worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers] == [True, True]
    os.kill(process.pid, signal.SIGTERM)
    assert end_of(process) == (143, "", "")  # the parent ends them
    assert_end(workers, 1)


def test_deferral_of_a_signal_is_limited(start: Start) -> None:
    process = start("watchdog.DEFER_TIMEOUT = 1.0\nwith Watchdog() as dog:\n    dog.is_deferred = True\n    wait()")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    assert end_of(process) == (129, "", "")


@pytest.mark.parametrize("code", [0, 1])
def test_child_failure_after_the_end_is_ignored(code: int, start: Start) -> None:
    """Such as a child that lingers and is killed, or fails while exiting."""
    process = start(
        f"""
watchdog.FINISH_TIMEOUT = 0.7
late = "import sys, time; time.sleep(" + ("60" if {code} == 0 else "0.2") + "); sys.exit({code})"
with signals.handle_signals(), Watchdog(0, 2) as dog:
    dog.watch_children({{1: subprocess.Popen([sys.executable, "-c", late])}})
time.sleep(1)
print("done", flush=True)
""",
        wait=False,
    )
    assert end_of(process, 20) == (0, "done\n", "")


def test_signals_are_deferred_where_they_must_not_raise(start: Start) -> None:
    process = start(
        """
with signals.handle_signals():
    try:
        with signals.deferred_signals() as deferred:
            ready()
            time.sleep(1)
            print("undisturbed", flush=True)
            deferred.run()
            print("never", flush=True)
    finally:
        print(signal.getsignal(signal.SIGTERM) is signals.raise_terminated, flush=True)
"""
    )
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (143, "undisturbed\nTrue\n", "")


def test_signals_act_where_they_are_not_deferred(start: Start) -> None:
    process = start(
        """
with signals.handle_signals():
    with signals.deferred_signals() as deferred:
        with deferred.undeferred():
            wait()
"""
    )
    process.send_signal(signal.SIGTERM)
    assert end_of(process, 3) == (143, "", "")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_whose_exception_is_swallowed_is_repeated(sent: signal.Signals, code: int, start: Start) -> None:
    process = start(
        """
class Finalized:
    def __del__(self):
        wait()

try:
    with signals.handle_signals(), signals.repeated_if_swallowed():
        Finalized()
        time.sleep(10)
except BaseException as error:
    sys.exit(130 if isinstance(error, KeyboardInterrupt) else error.code)
"""
    )
    process.send_signal(sent)
    assert end_of(process, 3) == (code, "", "")


def test_a_signal_that_is_swallowed_in_a_run_ends_it_in_time(start: Start) -> None:
    process = start(
        """
class Finalized:
    def __del__(self):
        wait()

with signals.repeated_if_swallowed(), Watchdog() as dog:
    dog.flush = lambda: print("kept", flush=True)
    Finalized()
    time.sleep(60)
"""
    )
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (143, "kept\n", f"INFO: ended by SIGTERM; {RESUME}\n")


def test_other_errors_that_are_swallowed_are_still_shown(start: Start) -> None:
    process = start(
        """
class Broken:
    def __del__(self):
        raise ValueError("in __del__")

with signals.repeated_if_swallowed():
    Broken()
ready()
"""
    )
    assert "ValueError: in __del__" in end_of(process)[2]


def test_killed_data_worker_does_not_end_a_process_that_runs_in_another_thread(start: Start) -> None:
    run = WORKERS[WORKERS.index("with Watchdog") :].replace("wait()", "print('ready', flush=True); time.sleep(3)")
    thread = f"""
import threading
def run():
{textwrap.indent(run.strip(), "    ")}
thread = threading.Thread(target=run)
thread.start()
thread.join()
print("alive")
"""
    process = start(WORKERS[: WORKERS.index("with Watchdog")] + thread)
    children_of(process, 2)[0].kill()
    assert end_of(process, 15) == (0, "alive\n", "")


def test_many_open_files_do_not_blind_the_watchdog(start: Start) -> None:
    process = start(
        """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
files = [open(os.devnull) for _ in range(1100)]
with Watchdog():
    started = time.process_time()
    time.sleep(1)
    print(time.process_time() - started < 0.3, flush=True)
    wait()
""",
        wait=False,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (143, "", "")
