"""Output of a command: log lines and a progress bar on stderr, errors in one line."""

import logging
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any, Self

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from transcriptformer.errors import TranscriptFormerError, one_line
from transcriptformer.runtime.parents import exit_with_launcher, is_launched
from transcriptformer.runtime.signals import TerminatedError, handle_signals, repeated_if_swallowed

logger = logging.getLogger(__name__)

ISSUES = "https://github.com/czi-ai/transcriptformer/issues"


class ClosedOutputError(BrokenPipeError):
    """Nobody reads the output, as after `| head`."""


_HANDLED_BY_TYPER = (typer.Exit, typer.Abort, ClosedOutputError)
"""Exceptions that Typer handles."""

SECONDS_BETWEEN_LINES = 30
"""Interval of log lines about progress, where there is no terminal for a bar."""


def printable(text: str) -> str:
    r"""Escape control and other invisible characters, such as \x1b, which names in files may contain."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def say(text: str, err: bool = False) -> None:
    """Print one or more lines of text, each made `printable`."""
    try:
        typer.echo("\n".join(map(printable, text.split("\n"))), err=err)
    except BrokenPipeError as error:
        raise ClosedOutputError(*error.args) from error


def show(renderable: Any) -> None:
    """Print a table or a text of rich to stdout."""
    try:
        Console(soft_wrap=True).print(renderable)
    except BrokenPipeError as error:
        raise ClosedOutputError(*error.args) from error


class PrintableFormatter(logging.Formatter):
    """Format log lines as level and `printable` message."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return f"{record.levelname}: {printable(record.getMessage())}"


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Log to stderr, and report errors as one line and an exit code, after the traceback if `debug`.

    Python warnings, all of which come from other packages, are shown only if `debug`.

    SIGTERM and SIGHUP raise TerminatedError.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter())
    ours = logging.getLogger("transcriptformer")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    exit_with_launcher()
    try:
        with nullcontext() if debug else _hidden_warnings(), handle_signals(), repeated_if_swallowed():
            yield
    except _HANDLED_BY_TYPER:
        raise
    except Exception as error:
        if debug:
            say(traceback.format_exc().rstrip(), err=True)
        say(f"ERROR: {_in_one_line(error)}", err=True)
        raise typer.Exit(getattr(error, "exit_code", 1)) from error
    finally:
        ours.removeHandler(handler)


@contextmanager
def _hidden_warnings() -> Iterator[None]:
    """Show no Python warnings.

    Filters stay, because other packages change them, and to let `-W error` raise.
    """
    shown = warnings.showwarning
    warnings.showwarning = lambda *_args, **_details: None
    try:
        yield
    finally:
        warnings.showwarning = shown


def _in_one_line(error: Exception) -> str:
    if isinstance(error, TranscriptFormerError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory ({one_line(error)})"
    cause = f"{type(error).__name__}: {one_line(error)}"
    return f"internal error ({cause}); rerun with --debug and report the traceback at {ISSUES}"


@contextmanager
def resumable(option: str = "") -> Iterator[None]:
    """Report an interruption in one line: the cause, what is kept, and how to continue."""
    try:
        yield
    except (KeyboardInterrupt, TerminatedError) as error:
        how = f"ended by {error.signal.name}" if isinstance(error, TerminatedError) else "interrupted"
        advice = f"rerun the same command with {option} to continue" if option else "rerun the same command to continue"
        kept = "; ".join(getattr(error, "__notes__", [])) or advice
        if not is_launched():
            with suppress(OSError):  # the terminal may be gone
                say(f"INFO: {how}; {kept}", err=True)
        raise typer.Exit(128 + (error.signal if isinstance(error, TerminatedError) else signal.SIGINT)) from None


class _Bar:
    """A progress bar on a terminal; elsewhere, a log line every `SECONDS_BETWEEN_LINES`."""

    def __init__(self, name: str, *columns: ProgressColumn, **fields: Any) -> None:
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn(name),
            BarColumn(),
            *columns,
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=None, **fields)
        self.first: float | None = None
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def show(self, n_done: float, n_total: float, describe: Callable[[float], str], **fields: str) -> None:
        """Show that `n_done` of `n_total` are done; the clock starts at the first call.

        Parameters
        ----------
        describe
            The log line without the time left, given the rate per second.
        fields
            Values of the bar's own columns.
        """
        now = time.monotonic()
        if self.first is None:
            self.first, self.started, self.last_line = n_done, now, now
            self.bar.start()
        self.bar.update(self.task, completed=n_done, total=n_total, **fields)  # type: ignore[arg-type]
        if self.bar.disable and n_done > self.first and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            rate = (n_done - self.first) / (now - self.started)
            logger.info("%s, %.0f s left", describe(rate), max(0, n_total - n_done) / rate)


class CountProgress(_Bar):
    """Progress bar with the number of items, rate and time left.

    Parameters
    ----------
    unit
        Name of the items, such as cells.
    action
        What is done with them.
    """

    def __init__(self, unit: str, action: str = "embedding") -> None:
        super().__init__(action, MofNCompleteColumn(), _PerSecond(unit))
        self.unit = unit

    def update(self, n_done: int, n_total: int) -> None:
        """Show that `n_done` of `n_total` are done."""
        self.show(n_done, n_total, lambda rate: f"{n_done} of {n_total} {self.unit}, {rate:.1f} per second")


class StepProgress(_Bar):
    """Progress bar with training steps, loss and time left."""

    def __init__(self) -> None:
        super().__init__("training", MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"), loss="")

    def update(self, n_done: int, n_steps: int, loss: float) -> None:
        """Show that `n_done` of `n_steps` are done, and the latest loss."""
        shown = f"{loss:.3f}"
        self.show(n_done, n_steps, lambda _: f"{n_done} of {n_steps} steps, loss {shown}", loss=shown)


class ByteProgress(_Bar):
    """Progress bar with downloaded bytes, rate and time left; thread-safe."""

    def __init__(self) -> None:
        super().__init__("downloading", DownloadColumn(), TransferSpeedColumn())
        self.n_done = self.n_bytes = 0
        self._lock = threading.Lock()

    def expect(self, n_bytes: int) -> None:
        """Add to the bytes to download."""
        with self._lock:
            self.n_bytes += n_bytes
            self._show()

    def resumed(self, n_bytes: int) -> None:
        """Subtract bytes that an earlier run downloaded."""
        self.expect(-n_bytes)

    def advance(self, n_bytes: int) -> None:
        """Add to the downloaded bytes."""
        with self._lock:
            self.n_done += n_bytes
            self._show()

    def _show(self) -> None:
        done, total = self.n_done / 1e6, self.n_bytes / 1e6
        self.show(self.n_done, self.n_bytes, lambda rate: f"{done:.0f} of {total:.0f} MB, {rate / 1e6:.1f} MB/s")


class _PerSecond(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self.unit}/s")
