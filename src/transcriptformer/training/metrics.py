"""Training and validation metrics: metrics.csv and a plot of the losses."""

import csv
import io
import math
import time
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from transcriptformer.storage.atomic import atomic_write, writing

_MEASURED = ("loss", "gene_nll", "count_nll", "label_loss", "label_accuracy")

COLUMNS = (
    *("step", "epoch", "seconds", "learning_rate", "gradient_norm", "genes"),
    *_MEASURED,
    *(f"validation_{name}" for name in _MEASURED),
)
"""Columns of metrics.csv. Losses are in nats, per gene or per labeled cell; `seconds` count from the latest start."""


class MetricsFile:
    """Appends metrics to a CSV file.

    The saved training state includes all lines up to its step (`text`). A resumed run rewrites the file from them, so
    a failed or partial write loses nothing.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    text
        The lines without the header.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, ""
        self.started = time.monotonic()

    def begin(self) -> None:
        """Write the header and the existing lines."""
        with atomic_write(self.path) as temporary:
            temporary.write_bytes((",".join(COLUMNS) + "\r\n" + self.text).encode())
        self.started = time.monotonic()

    def append(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Append a line with the metrics that have a column."""
        values = {name: f"{float(value):.7g}" for name, value in metrics.items() if name in COLUMNS}
        line = io.StringIO(newline="")
        row = {**values, "step": step, "seconds": round(time.monotonic() - self.started, 3)}
        csv.DictWriter(line, COLUMNS).writerow(row)
        with writing(self.path), self.path.open("ab") as file:
            file.write(line.getvalue().encode())
        self.text += line.getvalue()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Read the complete lines of a metrics file; return none if it is missing or not a metrics file."""
    content = path.read_bytes() if path.exists() else b""
    lines = content.decode(errors="replace").splitlines(keepends=True)
    if not lines or lines[0].strip() != ",".join(COLUMNS):
        return []
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def plot_losses(metrics: Path, plot: Path, baseline: float | None) -> None:
    """Plot the losses over the steps.

    Parameters
    ----------
    metrics, plot
        Metrics file to read, and PNG file to write.
    baseline
        Loss of the frequency baseline, drawn as a horizontal line; None: no line.
    """
    table = pd.read_csv(metrics)
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for column, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
            rows = table[table[column].notna()]
            if len(rows):
                axes.plot(rows["step"], rows[column], style, label=label, markersize=3, linewidth=1)
        if baseline is not None and math.isfinite(baseline):
            axes.axhline(baseline, linestyle="--", linewidth=1, color="gray", label="frequency baseline")
        axes.set(xlabel="step", ylabel="loss (nats)")
        axes.legend(frameon=False)
        with atomic_write(plot) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
