"""A watchdog that ends a process on a signal, or with the other processes of its run, within seconds."""

import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from types import FrameType, TracebackType
from typing import NoReturn, Self

from transcriptformer.errors import TranscriptFormerError
from transcriptformer.runtime.links import KILLED, Links
from transcriptformer.runtime.parents import (
    FIRST_KILLED,
    POLL_INTERVAL,
    exit_now,
    lost_worker_message,
    workers,
    write_stderr,
)
from transcriptformer.runtime.signals import RESUME, SIGNALS, TerminatedError, handle_signals, interrupt_main_thread

TERMINATION_TIMEOUT = 7.0
"""Seconds for the main thread to save results and exit before the process is killed."""

DEFER_TIMEOUT = 4.0
"""Maximum seconds to defer a signal."""

FLUSH_TIMEOUT = 1.0
"""Seconds for a last flush before the process is killed."""

JOIN_TIMEOUT = 3.0
"""Seconds for child processes to exit when this one fails."""

FINISH_TIMEOUT = 30.0
"""Seconds for child processes to exit after a successful run."""


class ProcessEndedError(TranscriptFormerError):
    """Another process of the run, or a data worker, ended prematurely."""


class _Lost(SystemExit):
    """Raised in the main thread when another process is lost; only the watchdog catches it."""

    signal = signal.SIGTERM


class Watchdog:
    """Raise in the main thread on SIGTERM and SIGHUP, or when another process of the run ends prematurely.

    The main thread can then save results and exit. If it has not exited after `TERMINATION_TIMEOUT` seconds, as in a
    collective operation that waits for a lost process, the watchdog thread kills the process.

    A run in another thread cannot be interrupted, nor should the process end with it. There, the watchdog only provides
    the message for the error that PyTorch raises.

    Parameters
    ----------
    rank, n_processes
        Rank of this process, and number of processes.

    Attributes
    ----------
    flush
        Called before the process is killed.
    is_deferred
        Whether signals are deferred until `end` is called, for at most `DEFER_TIMEOUT` seconds.
    received
        The signal that ends the process, or None.
    """

    def __init__(self, rank: int = 0, n_processes: int = 1) -> None:
        self.rank, self.n_processes = rank, n_processes
        self.flush: Callable[[], object] = lambda: None
        self.is_deferred = False
        self.received: signal.Signals | None = None
        self.links = Links()
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._lost: str | None = None  # error message about a lost process; empty: already reported
        self._finished: set[int] = set()
        self._has_raised = self._is_ending = self._has_left = False
        self._deadline: float | None = None
        self._deferred_until: float | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        self._can_interrupt = threading.current_thread() is threading.main_thread()
        self._is_closed, self._is_lost = threading.Event(), threading.Event()
        self._wakeup, self._signalled = socket.socketpair()
        self._listen()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child processes, and raise an error that names the process that was lost.

        Raises
        ------
        ProcessEndedError
            In the first process, if another one was killed.
        """
        if error is None:
            self._is_ending = self._has_raised = True
            self._join(FINISH_TIMEOUT)
        else:
            self.fail(error)
        self.is_deferred = False
        self._has_left = True
        is_in_time = self._deadline is None  # else the thread keeps running, in case interpreter shutdown hangs
        if is_in_time:
            self._is_closed.set()
            self._signalled.send(b"\0")  # wakes the thread
            self._thread.join()
        self._exit.close()
        if is_in_time:
            self._wakeup.close()
            self._signalled.close()
        self.links.close(_exit_code(error))
        if error is None:
            return
        if self.rank > 0 and isinstance(error, KeyboardInterrupt | SystemExit | ProcessEndedError):
            raise SystemExit(_exit_code(error)) from None  # reported by the first process
        if self._lost is not None and isinstance(error, SystemExit | ProcessEndedError):
            if self._lost == "":  # already reported
                raise SystemExit(1) from None
            raise ProcessEndedError(self._lost) from None

    def install_handlers(self) -> None:
        """Reinstall the signal handlers after something else replaced them."""
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    signal.signal(signum, self._react)

    def watch_children(self, children: Mapping[int, subprocess.Popen[bytes]]) -> None:
        """Watch child processes, by rank, and end them with this one."""
        self._children = dict(children)

    def fail(self, error: BaseException) -> None:
        """Terminate the child processes after an error in this one; they save their results."""
        self._has_raised = True  # else the watchdog could raise here, and the error would go unreported
        if isinstance(error, ProcessEndedError):
            self._is_lost.wait(2)  # the main thread may notice first, but the watchdog thread knows which process
        self._is_ending = True
        for rank, child in self._children.items():
            if rank not in self._finished:
                child.terminate()
        self._join(JOIN_TIMEOUT)

    def end(self) -> NoReturn:
        """Raise the deferred signal, received in this process or in another one."""
        self.is_deferred, self._has_raised = False, True
        self._start_clock(128 + (self.received or signal.SIGTERM))
        self._raise()

    def _raise(self) -> NoReturn:
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise TerminatedError(self.received or signal.SIGTERM)

    def _join(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for child in self._children.values():
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, until - time.monotonic()))
            child.kill()
            child.wait()

    def _listen(self) -> None:
        """Install handlers, and wake the watchdog thread on signals even if the main thread runs no Python code."""
        self._exit.enter_context(handle_signals(self._react))
        if threading.current_thread() is not threading.main_thread():
            return
        self._wakeup.setblocking(False)
        self._signalled.setblocking(False)
        before = signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
        if before == -1:
            self._exit.callback(signal.set_wakeup_fd, -1)
        else:  # an event loop uses it, as in a notebook
            signal.set_wakeup_fd(before)

    def _react(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler in the main thread."""
        self._note(signum)
        if self.is_deferred and self._lost is None:
            return
        if self._has_raised or self._is_ending:
            return
        self._has_raised = True
        if self._lost is not None:
            raise _Lost(1)
        self._raise()

    def _note(self, signum: int) -> None:
        if self._lost is None and self.received in (None, signal.SIGINT):
            self.received = signal.Signals(signum)
            # Ctrl-C always raises KeyboardInterrupt; it must not kill a notebook's kernel.
            must_end = self.n_processes > 1 if signum == signal.SIGINT else not self.is_deferred
            if must_end:
                self._start_clock(128 + signum)
            elif signum != signal.SIGINT:
                self._deferred_until = time.monotonic() + DEFER_TIMEOUT

    def _start_clock(self, exit_code: int) -> None:
        """Start the termination timeout, and tell the other processes to exit."""
        if self._deadline is None:
            self._deadline = time.monotonic() + TERMINATION_TIMEOUT
            self.links.send_exit_code(exit_code)

    def _watch(self) -> None:
        while not self._is_closed.is_set():
            ready = self._wait()
            if self._wakeup in ready:
                for signum in self._wakeup.recv(4096):
                    if signum in (*SIGNALS, signal.SIGINT):
                        self._note(signum)
            for link, rank in list(self.links.ranks.items()):
                if link in ready:
                    self._on_process_end(rank, self.links.exit_code(link))
            for rank, child in self._children.items():
                if child.poll() is not None:
                    self._on_process_end(rank, child.returncode)
            self._check_workers()
            if self.is_deferred and self._deferred_until is not None and time.monotonic() > self._deferred_until:
                self._stop_deferring()
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._kill()

    def _wait(self) -> list[object]:
        """Wait up to `POLL_INTERVAL` for the wake-up socket and the links, and return those that are readable."""
        with selectors.DefaultSelector() as selector:
            try:
                for link in (self._wakeup, *self.links.ranks):
                    selector.register(link, selectors.EVENT_READ)
                return [key.fileobj for key, _ in selector.select(POLL_INTERVAL)]
            except (OSError, ValueError, KeyError):  # the main thread has closed a link in the meantime
                time.sleep(POLL_INTERVAL / 10)
                return []

    def _on_process_end(self, rank: int, exit_code: int) -> None:
        """React to the end of another process, in the watchdog thread."""
        if rank in self._finished or self._is_ending:
            return
        self._finished.add(rank)
        has_agreed = self.received is not None and (not self.is_deferred or exit_code > 128)
        if exit_code == 0 or self._lost is not None or has_agreed:
            return
        if self.rank > 0 and exit_code == KILLED:
            exit_now(1, FIRST_KILLED if self.rank == 1 else "")  # a resumed run may already be running
        self._lose("" if exit_code in (1, 2) else self._describe(rank, exit_code))

    def _check_workers(self) -> None:
        """Detect killed data workers, for whose data the main thread may wait forever."""
        ended = [worker for worker in list(workers) if worker.exitcode is not None]
        ended = [worker for worker in ended if worker in workers]  # else `kill_worker` removed it in the meantime
        workers.difference_update(ended)
        dead = [worker for worker in ended if worker.exitcode not in (0, -signal.SIGTERM)]  # SIGTERM: by the loader
        if not dead or self._is_ending or self._lost is not None or self._deadline is not None:
            return
        message = lost_worker_message(dead[0].pid, _named_signal(-(dead[0].exitcode or 0)) or "killed")
        for worker in list(workers):
            if worker.pid is not None:  # else it has not started yet, and cannot be killed
                worker.kill()  # they may wait for each other, and the exiting process joins them
        if self.rank > 0:
            write_stderr(f"ERROR: {message}")  # before the first process ends this one
            message = ""
        self._lose(message)

    def _lose(self, message: str) -> None:
        """Interrupt the main thread, from the watchdog thread, because another process was lost."""
        self._lost = message
        self._is_lost.set()
        if self._can_interrupt:
            self._start_clock(1)
            interrupt_main_thread()

    def _stop_deferring(self) -> None:
        """Interrupt the main thread, from the watchdog thread, after deferring a signal for too long."""
        self.is_deferred = False
        self._start_clock(128 + (self.received or signal.SIGTERM))
        interrupt_main_thread()

    def _kill(self) -> NoReturn:
        flushing = threading.Thread(target=self.flush, daemon=True)
        flushing.start()
        flushing.join(FLUSH_TIMEOUT)
        for child in self._children.values():
            child.kill()
        message, code = "", 1
        if self._lost:
            message = f"ERROR: {self._lost}"
        elif self._lost is None and self.received is not None:
            message, code = f"INFO: ended by {self.received.name}; {RESUME}", 128 + self.received
        self.links.close(code)
        exit_now(code, message if self.rank == 0 and not self._has_left else "")

    def _describe(self, rank: int, code: int) -> str:
        child = self._children.get(rank)
        if code == KILLED and child is not None:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(JOIN_TIMEOUT)
        who = f"process {rank} of {self.n_processes}" + (f" ({child.pid})" if child is not None else "")
        how = _named_signal(-code if code < 0 and child is not None else code - 128) or "killed"
        return f"{who} was {how}; {RESUME}"


def _named_signal(signum: int) -> str | None:
    """Describe the end by a signal; None for an unknown signal number."""
    with suppress(ValueError):
        return f"ended by {signal.Signals(signum).name}"
    return None


def _exit_code(error: BaseException | None) -> int:
    """Return the exit code of a process that ends with an error, or 0 for None."""
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
