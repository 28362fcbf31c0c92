"""How a command speaks to people: log lines and a progress bar on stderr, errors in one line."""

import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
from transcriptformer.runtime.parents import end_with_launcher, is_launched
from transcriptformer.runtime.signals import Ended, handling

logger = logging.getLogger(__name__)

ISSUES = "https://github.com/czi-ai/transcriptformer/issues"

_NO_ERRORS = (typer.Exit, typer.Abort, BrokenPipeError)
"""Ways to end, which typer knows."""

SECONDS_BETWEEN_LINES = 30
"""How often progress is logged where there is no terminal for a bar."""


def printable(text: str) -> str:
    r"""One line with what a terminal would act upon, or not show, in the form of an escape such as \x1b.

    Names and texts of a file may hold anything: control characters, marks that reverse the direction, line ends.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def say(text: str, err: bool = False) -> None:
    """Print a text of one or more lines, each as `printable`."""
    typer.echo("\n".join(map(printable, text.split("\n"))), err=err)


class PrintableFormatter(logging.Formatter):
    """Lines of the log: the level and a message that is `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return f"{record.levelname}: {printable(record.getMessage())}"


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Log to stderr, and turn errors into one line and an exit code, with `debug` below the traceback.

    An error that the user cannot put right is a line, too, which says so. SIGTERM and
    SIGHUP raise Ended.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter())
    ours = logging.getLogger("transcriptformer")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    end_with_launcher()
    try:
        with handling():
            yield
    except _NO_ERRORS:
        raise
    except Exception as error:
        if debug:
            say(traceback.format_exc().rstrip(), err=True)
        say(f"ERROR: {_in_one_line(error)}", err=True)
        raise typer.Exit(getattr(error, "exit_code", 1)) from error
    finally:
        ours.removeHandler(handler)


def _in_one_line(error: Exception) -> str:
    if isinstance(error, TranscriptFormerError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory ({one_line(error)})"
    cause = f"{type(error).__name__}: {one_line(error)}"
    return f"internal error ({cause}); run it with --debug and report what it shows at {ISSUES}"


@contextmanager
def resumable(option: str = "") -> Iterator[None]:
    """Say in one line what ended a run, what is kept, and which option goes on with it, if one is needed."""
    try:
        yield
    except (KeyboardInterrupt, Ended) as error:
        how = f"ended by {error.signal.name}" if isinstance(error, Ended) else "interrupted"
        to_go_on = f"the same command with {option} goes on" if option else "the same command goes on from here"
        kept = "; ".join(getattr(error, "__notes__", [])) or to_go_on
        if not is_launched():
            with suppress(OSError):  # the terminal may be gone
                say(f"INFO: {how}; {kept}", err=True)
        raise typer.Exit(128 + (error.signal if isinstance(error, Ended) else signal.SIGINT)) from None


class _Bar:
    """A bar on a terminal; elsewhere, a log line now and then."""

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
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()


class CountProgress(_Bar):
    """How many are embedded, how many per second and the time left.

    Parameters
    ----------
    unit
        What is counted, such as cells.
    """

    def __init__(self, unit: str) -> None:
        super().__init__("embedding", MofNCompleteColumn(), _PerSecond(unit))
        self.unit = unit

    def update(self, n_done: int, n_total: int) -> None:
        """Show that `n_done` of `n_total` are done; the clock starts at the first call."""
        now = time.monotonic()
        if n_done == 0:
            self.started = self.last_line = now
            self.bar.start()
        self.bar.update(self.task, completed=n_done, total=n_total)
        if self.bar.disable and n_done and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            rate = n_done / (now - self.started)
            left = (n_total - n_done) / rate
            logger.info("%d of %d %s, %.1f per second, %.0f s left", n_done, n_total, self.unit, rate, left)


class StepProgress(_Bar):
    """Steps of training, the loss and the time left."""

    def __init__(self) -> None:
        super().__init__("training", MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"), loss="")
        self.first: int | None = None

    def update(self, n_done: int, n_steps: int, loss: float) -> None:
        """Show that `n_done` of `n_steps` are done; the clock starts at the first call."""
        now = time.monotonic()
        if self.first is None:
            self.first, self.started, self.last_line = n_done, now, now
            self.bar.start()
        self.bar.update(self.task, completed=n_done, total=n_steps, loss=f"{loss:.3f}")
        if self.bar.disable and n_done > self.first and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            left = (n_steps - n_done) * (now - self.started) / (n_done - self.first)
            logger.info("%d of %d steps, loss %.3f, %.0f s left", n_done, n_steps, loss, left)


class ByteProgress(_Bar):
    """Bytes fetched, bytes per second and the time left; threads may use it at once."""

    def __init__(self) -> None:
        super().__init__("downloading", DownloadColumn(), TransferSpeedColumn())
        self.n_done = self.n_bytes = 0
        self._lock = threading.Lock()

    def expect(self, n_bytes: int) -> None:
        """There are so many more to come."""
        with self._lock:
            self.n_bytes += n_bytes
            self.bar.start()
            self.bar.update(self.task, total=self.n_bytes)

    def found(self, n_bytes: int) -> None:
        """So many of them were there already."""
        self.expect(-n_bytes)

    def advance(self, n_bytes: int) -> None:
        """So many more have come."""
        with self._lock:
            self.n_done += n_bytes
            self.bar.update(self.task, completed=self.n_done)
            now = time.monotonic()
            if self.bar.disable and now - self.last_line > SECONDS_BETWEEN_LINES:
                self.last_line = now
                rate = max(self.n_done, 1) / (now - self.started)
                left = max(0, self.n_bytes - self.n_done) / rate
                logger.info(
                    "%.0f of %.0f MB, %.1f MB/s, %.0f s left", self.n_done / 1e6, self.n_bytes / 1e6, rate / 1e6, left
                )


class _PerSecond(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self.unit}/s")
