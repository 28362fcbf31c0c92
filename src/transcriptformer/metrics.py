"""What training reports: a line in metrics.csv for every so many steps and every validation, and a picture of it."""

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_utilities.core.rank_zero import rank_zero_only
from matplotlib.figure import Figure
from pytorch_lightning.loggers import Logger

from transcriptformer.storage.atomic import atomic_write, writing

_MEASURED = ("loss", "gene_nll", "count_nll", "label_loss", "label_accuracy")

COLUMNS = (
    *("step", "epoch", "seconds", "learning_rate", "gradient_norm", "genes"),
    *_MEASURED,
    *(f"validation_{name}" for name in _MEASURED),
)
"""Of metrics.csv. Losses are in nats, per gene or per cell with a label; `seconds` from the latest start."""


class MetricsFile(Logger):
    """Appends to a CSV file, which can be read at any time.

    Parameters
    ----------
    path
        The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.started = path, time.monotonic()

    @property
    def name(self) -> str:  # noqa: D102
        return self.path.stem

    @property
    def version(self) -> str:  # noqa: D102
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> None:
        """There is no other object behind this one."""

    @rank_zero_only
    def log_hyperparams(self, *unused: Any, **unused_too: Any) -> None:
        """The configuration has a file of its own."""

    @rank_zero_only
    def begin(self, step: int) -> None:
        """Keep only the lines up to a step, from which a run goes on; begin the file where there is none."""
        rows = (
            [row for row in read_metrics(self.path) if int(row["step"]) <= step] if step and self.path.exists() else []
        )
        with atomic_write(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self.started = time.monotonic()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line."""
        seconds = round(time.monotonic() - self.started, 3)
        row = {
            "step": int(step or 0),
            "seconds": seconds,
            **{k: f"{v:.7g}" for k, v in metrics.items() if k in COLUMNS},
        }
        with writing(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The whole lines of a metrics file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def plot_losses(metrics: Path, picture: Path, baseline: float | None) -> None:
    """Draw the losses over the steps.

    Parameters
    ----------
    metrics, picture
        What to read and what to write.
    baseline
        The loss without a model, for a line across.
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
            axes.axhline(baseline, linestyle="--", linewidth=1, color="gray", label="genes and counts by frequency")
        axes.set(xlabel="step", ylabel="loss (nats)")
        axes.legend(frameon=False)
        with atomic_write(picture) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
