"""Ends a process on a signal, and with the other processes of its run, within seconds and whatever it is doing."""

import select
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
from transcriptformer.runtime.parents import FIRST_KILLED, POLL_INTERVAL, exit_now, lost_worker, say, workers
from transcriptformer.runtime.signals import RESUME, SIGNALS, Ended, handling

TIME_TO_END = 7.0
"""Seconds that the main thread has to keep what is computed and to end, before the process is ended by force."""

TIME_TO_DEFER = 4.0
"""Seconds that a signal waits at most where it is deferred."""

TIME_TO_FLUSH = 1.0
"""Seconds for a last flush then."""

TIME_TO_JOIN = 3.0
"""Seconds that child processes have to end by themselves when this one fails."""

TIME_TO_FINISH = 30.0
"""Seconds that they have when all is done."""


class ProcessEndedError(TranscriptFormerError):
    """Another process of the run, or a data worker, has ended before it was done."""


class _Lost(SystemExit):
    """Raised in the main thread then; nothing but the watchdog shall catch it."""


class Watchdog:
    """Makes the main thread raise on SIGTERM and SIGHUP, or when another process of the run has ended too early.

    So the main thread can keep what is computed and end. If it has not ended after `TIME_TO_END` seconds, such as in a
    collective operation that waits for a process that is gone, a thread ends the process by force.

    Parameters
    ----------
    rank, n_processes
        Which process of how many this is.

    Attributes
    ----------
    flush
        Called before the process is ended by force.
    is_deferred
        Whether a signal waits until `end` is called, or `TIME_TO_DEFER` seconds, rather than raise.
    received
        The signal that ends the process, if there was one.
    """

    def __init__(self, rank: int = 0, n_processes: int = 1) -> None:
        self.rank, self.n_processes = rank, n_processes
        self.flush: Callable[[], object] = lambda: None
        self.is_deferred = False
        self.received: signal.Signals | None = None
        self.links = Links()
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._lost: str | None = None  # what is to be said of a process that ended too early
        self._finished: set[int] = set()
        self._has_raised = self._is_ending = self._has_left = False
        self._deadline: float | None = None
        self._deferred_until: float | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        self._is_closed, self._is_lost = threading.Event(), threading.Event()
        self._wakeup, self._signalled = socket.socketpair()
        self._listen()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what depends on this process, and turn the end of another process into an error that names it.

        Raises
        ------
        ProcessEndedError
            In the first process, if another one was killed.
        """
        if error is None:
            self._is_ending = self._has_raised = True
            self._join(TIME_TO_FINISH)
        else:
            self.fail(error)
        self.is_deferred = False
        self._has_left = True
        is_in_time = self._deadline is None  # else the thread stays, lest something hangs until the interpreter is gone
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
            raise SystemExit(_exit_code(error)) from None  # it is said elsewhere
        if self._lost is not None and isinstance(error, SystemExit | ProcessEndedError):
            if self._lost == "":  # somebody has said why
                raise SystemExit(1) from None
            raise ProcessEndedError(self._lost) from None

    def take_signals(self) -> None:
        """Handle signals again, where another handler has been set in between."""
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    signal.signal(signum, self._react)

    def care_for(self, children: Mapping[int, subprocess.Popen[bytes]]) -> None:
        """Watch child processes, by rank; they end with this one."""
        self._children = dict(children)

    def fail(self, error: BaseException) -> None:
        """End child processes, since an error ends this one; they keep what they have computed."""
        self._has_raised = True  # else what is noticed in the meantime would raise here, and nobody would say it
        if isinstance(error, ProcessEndedError):
            self._is_lost.wait(2)  # the main thread may be the first to notice; the watching thread knows more
        self._is_ending = True
        for rank, child in self._children.items():
            if rank not in self._finished:
                child.terminate()
        self._join(TIME_TO_JOIN)

    def end(self) -> NoReturn:
        """Raise what was deferred, in this process or in another one."""
        self.is_deferred, self._has_raised = False, True
        self._start_clock(128 + (self.received or signal.SIGTERM))
        self._raise()

    def _raise(self) -> NoReturn:
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise Ended(self.received or signal.SIGTERM)

    def _join(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for child in self._children.values():
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, until - time.monotonic()))
            child.kill()
            child.wait()

    def _listen(self) -> None:
        """Handle signals; the watching thread hears of them too, even while the main thread runs no Python code."""
        self._exit.enter_context(handling(self._react))
        if threading.current_thread() is not threading.main_thread():
            return
        self._wakeup.setblocking(False)
        self._signalled.setblocking(False)
        before = signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
        if before == -1:
            self._exit.callback(signal.set_wakeup_fd, -1)
        else:  # an event loop listens there, as in a notebook
            signal.set_wakeup_fd(before)

    def _react(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal, in the main thread."""
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
            # Ctrl-C, which raises in any case, must not end the kernel of a notebook.
            if self.n_processes > 1 if signum == signal.SIGINT else not self.is_deferred:
                self._start_clock(128 + signum)
            elif signum != signal.SIGINT:
                self._deferred_until = time.monotonic() + TIME_TO_DEFER

    def _start_clock(self, exit_code: int) -> None:
        """Let the main thread have so much time; the others begin to end, too."""
        if self._deadline is None:
            self._deadline = time.monotonic() + TIME_TO_END
            self.links.say(exit_code)

    def _watch(self) -> None:
        while not self._is_closed.is_set():
            try:
                ready, _, _ = select.select([self._wakeup, *self.links.ranks], [], [], POLL_INTERVAL)
            except (OSError, ValueError):  # the main thread has closed a link in the meantime
                ready = []
            if self._wakeup in ready:
                for signum in self._wakeup.recv(4096):
                    if signum in (*SIGNALS, signal.SIGINT):
                        self._note(signum)
            for link in ready:
                if link in self.links.ranks:
                    rank = self.links.ranks[link]
                    self._ended(rank, self.links.exit_code(link))
            for rank, child in self._children.items():
                if child.poll() is not None:
                    self._ended(rank, child.returncode)
            self._look_at_workers()
            if self.is_deferred and self._deferred_until is not None and time.monotonic() > self._deferred_until:
                self._stop_deferring()
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._end_by_force()

    def _ended(self, rank: int, exit_code: int) -> None:
        """React to the end of another process, in the watching thread."""
        if rank in self._finished or self._is_ending:
            return
        self._finished.add(rank)
        has_agreed = self.received is not None and (not self.is_deferred or exit_code > 128)
        if exit_code == 0 or self._lost is not None or has_agreed:
            return
        if self.rank > 0 and exit_code == KILLED:
            exit_now(1, FIRST_KILLED if self.rank == 1 else "")  # a resumed run may be at work already
        self._lose("" if exit_code in (1, 2) else self._describe(rank, exit_code))

    def _look_at_workers(self) -> None:
        """Notice that a data worker was killed, which may leave whoever waits for its data in the lurch."""
        ended = [worker for worker in list(workers) if worker.exitcode is not None]
        ended = [worker for worker in ended if worker in workers]  # else it was dismissed in the meantime
        workers.difference_update(ended)
        dead = [worker for worker in ended if worker.exitcode not in (0, -signal.SIGTERM)]  # as loaders end them
        if not dead or self._is_ending or self._lost is not None or self._deadline is not None:
            return
        words = lost_worker(dead[0].pid, _named_signal(-(dead[0].exitcode or 0)) or "killed")
        for worker in list(workers):
            worker.kill()  # they may wait for each other, and who ends waits for them
        if self.rank > 0:
            say(f"ERROR: {words}")  # before the first process ends this one
            words = ""
        self._lose(words)

    def _lose(self, words: str) -> None:
        """End, in the watching thread, because another process has ended; `words` say which."""
        self._lost = words
        self._is_lost.set()
        self._start_clock(1)
        _interrupt_main_thread()

    def _stop_deferring(self) -> None:
        """End, in the watching thread, what takes too long to come to a better moment."""
        self.is_deferred = False
        self._start_clock(128 + (self.received or signal.SIGTERM))
        _interrupt_main_thread()

    def _end_by_force(self) -> NoReturn:
        flushing = threading.Thread(target=self.flush, daemon=True)
        flushing.start()
        flushing.join(TIME_TO_FLUSH)
        for child in self._children.values():
            child.kill()
        words, code = "", 1
        if self._lost:
            words = f"ERROR: {self._lost}"
        elif self._lost is None and self.received is not None:
            words, code = f"INFO: ended by {self.received.name}; {RESUME}", 128 + self.received
        self.links.close(code)
        exit_now(code, words if self.rank == 0 and not self._has_left else "")

    def _describe(self, rank: int, code: int) -> str:
        child = self._children.get(rank)
        if code == KILLED and child is not None:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(TIME_TO_JOIN)
        who = f"process {rank} of {self.n_processes}" + (f" ({child.pid})" if child is not None else "")
        how = _named_signal(-code if code < 0 and child is not None else code - 128) or "killed"
        return f"{who} was {how}; {RESUME}"


def _interrupt_main_thread() -> None:
    main = threading.main_thread().ident
    if main is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main, signal.SIGTERM)


def _named_signal(signum: int) -> str | None:
    """Say that a signal ended something, if there is such a signal."""
    with suppress(ValueError):
        return f"ended by {signal.Signals(signum).name}"
    return None


def _exit_code(error: BaseException | None) -> int:
    """Exit code of a process that ends with an error."""
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
