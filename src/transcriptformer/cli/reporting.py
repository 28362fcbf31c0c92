"""How a command speaks to people: log lines and a progress bar on stderr, errors in one line."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

from transcriptformer.errors import TranscriptFormerError

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30
"""How often progress is logged where there is no terminal for a bar."""


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Log to stderr, and turn errors into one line and an exit code; with `debug`, leave the traceback."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    ours = logging.getLogger("transcriptformer")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    except TranscriptFormerError as error:
        if debug:
            raise
        typer.echo(f"ERROR: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(error.exit_code) from error
    finally:
        ours.removeHandler(handler)


@contextmanager
def resumable(option: str = "") -> Iterator[None]:
    """Say of what Ctrl-C ended that it is not lost, and which option goes on with it, if one is needed."""
    try:
        yield
    except KeyboardInterrupt:
        with_option = f" with {option}" if option else ""
        typer.echo(f"Interrupted; the same command{with_option} goes on from here.", err=True)
        raise typer.Exit(130) from None


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
