"""Ranked dot plot of the effects of perturbations."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from transcriptformer.errors import DataError
from transcriptformer.generation.effects import ALL
from transcriptformer.generation.picture import save

MAX_ROWS, MAX_GROUPS = 40, 10
"""Maximum number of perturbations, those with the largest effects, and of groups, those with most cells."""


def draw(table: pd.DataFrame, picture: Path) -> None:
    """Draw the mean shift by each perturbation with its interval, the largest at the top, in a color per group.

    Perturbations are ranked by their largest mean in a group. With a null, its mean is a gray tick.

    Raises
    ------
    TranscriptFormerError
        If no perturbation has an effect in a cell, or the picture cannot be written.
    """
    shown = table[table["mean"].notna()]
    groups = [group for group in shown["group"].unique() if group != ALL]
    groups = sorted(groups, key=lambda group: -shown.loc[shown["group"] == group, "n_cells"].max())[:MAX_GROUPS]
    shown = shown[shown["group"].isin(groups or [ALL])]
    if shown.empty:
        raise DataError("--plot: no cell expresses a perturbed gene")
    ranked = shown.groupby("perturbation")["mean"].max().sort_values()[-MAX_ROWS:].index
    figure = Figure(figsize=(7, 1.5 + 0.3 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    offsets = np.linspace(0.3, -0.3, len(groups)) if len(groups) > 1 else [0.0]
    for color, offset, group in zip([f"C{i}" for i in range(MAX_GROUPS)], offsets, groups or [ALL], strict=False):
        of_group = shown[shown["group"] == group].set_index("perturbation").reindex(ranked)
        y, mean = np.arange(len(ranked)) + offset, of_group["mean"]
        interval = [(mean - of_group["ci_low"]).fillna(0).clip(0), (of_group["ci_high"] - mean).fillna(0).clip(0)]
        axes.errorbar(mean, y, xerr=interval, fmt="o", markersize=4, linewidth=1, color=color, label=group)
        if "null_mean" in of_group:
            axes.plot(of_group["null_mean"], y, "|", color="gray", markersize=9, zorder=0)
    axes.set_yticks(range(len(ranked)), list(ranked), fontsize=8)
    axes.set_xlabel("mean cosine shift, 95 % interval" + (" (gray: null)" if "null_mean" in table else ""))
    axes.grid(axis="y", linewidth=0.3)
    if groups:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save(figure, picture)
