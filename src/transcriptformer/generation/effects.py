"""The effects of perturbations on groups of cells, as a table."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from transcriptformer.generation.null import adjusted, compare_with_null
from transcriptformer.runs.task import Results

SHIFT_KEY, NULL_SHIFT, LABEL_CHANGE, ONLY_GENE = "cosine_shift", "null_shift", "label_change", "only_gene"
"""Fields of a cell: shift by each perturbation, and by those of the null; change of the probability of each label by
each perturbation; and token of its gene, if it has only one, else -1."""

ALL = "all"
"""Name of the group of all cells."""

N_RESAMPLES = 1000
"""Bootstrap samples of the mean."""

BLOCK_BYTES = 2**23
"""Approximate size of the blocks in which results are read."""

_COLUMN_BYTES = 2**25
"""Maximum size of the columns that are held at a time, of at least one perturbation."""

_MAX_DRAWS = 2**20
"""Maximum number of cells that are drawn at a time for bootstrap samples."""


class Groups(NamedTuple):
    """Groups of the cells of a run.

    Attributes
    ----------
    of_row
        Index of the group of each cell (cells,), -1 if it is in none.
    names
        Names of the groups, besides that of all cells.
    """

    of_row: np.ndarray
    names: list[str]

    def members(self, start: int, stop: int) -> np.ndarray:
        """Return which cells of `start:stop` are in each group, after that of all cells (1 + groups, cells), bool."""
        of_row = self.of_row[start:stop]
        return np.concatenate([np.ones((1, len(of_row)), bool), of_row == np.arange(len(self.names))[:, None]])


def blocks(results: Results, name: str, n_cells: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of cells whose records of a field take about `BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // results.layout[name].record_bytes)
    for start in range(0, n_cells, step):
        yield start, min(start + step, n_cells)


def group_means(results: Results, name: str, groups: Groups) -> np.ndarray:
    """Return the mean of a field over the cells of each group where it is not missing (1 + groups, width), float64."""
    shape = 1 + len(groups.names), results.layout[name].width
    sums, counts = np.zeros(shape), np.zeros(shape)
    for start, stop in blocks(results, name, len(groups.of_row)):
        values, members = results.read(name, start, stop), groups.members(start, stop).astype(np.float64)
        is_known = ~np.isnan(values)
        sums += members @ np.where(is_known, values, 0)
        counts += members @ is_known
    with np.errstate(invalid="ignore"):
        return sums / counts


def tabulate(
    results: Results, names: Sequence[str], genes: Sequence[str], tokens: np.ndarray, groups: Groups, seed: int
) -> pd.DataFrame:
    """Summarize the shifts by each perturbation over all cells and each group, perturbation by perturbation.

    Parameters
    ----------
    names, genes, tokens
        Name, gene id and token of each perturbation.
    seed
        Seed of the bootstrap.
    """
    n_cells, rows = len(groups.of_row), list[dict[str, object]]()
    members = groups.members(0, n_cells)
    only_gene = results.read(ONLY_GENE, 0, n_cells)
    n_columns = max(1, _COLUMN_BYTES // (4 * max(1, n_cells)))
    for first in range(0, len(names), n_columns):
        chosen = range(first, min(first + n_columns, len(names)))
        ranges = blocks(results, SHIFT_KEY, n_cells)
        columns = np.concatenate([results.read(SHIFT_KEY, *cells)[:, chosen.start : chosen.stop] for cells in ranges])
        for i, shifts in zip(chosen, columns.T, strict=True):
            is_emptied = np.isnan(shifts) & (only_gene == tokens[i])
            for group, of_group in zip((ALL, *groups.names), members, strict=True):
                rng = np.random.default_rng([seed, i, len(rows)])
                counts = {"n_cells": int(of_group.sum()), "n_emptied": int((is_emptied & of_group).sum())}
                named = {"perturbation": names[i], "gene": genes[i], "group": group}
                rows.append({**named, **_summary(shifts[of_group], counts, rng)})
    return pd.DataFrame(rows)


def _summary(shifts: np.ndarray, counts: dict[str, int], rng: np.random.Generator) -> dict[str, object]:
    known = shifts[~np.isnan(shifts)].astype(np.float64)
    low, high = bootstrap_interval(known, rng)
    return {
        "n_cells": counts["n_cells"],
        "n_expressing": len(known) + counts["n_emptied"],
        "n_emptied": counts["n_emptied"],
        "mean": known.mean() if len(known) else np.nan,
        "median": np.median(known) if len(known) else np.nan,
        "ci_low": low,
        "ci_high": high,
    }


def bootstrap_interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Return the 95 % bootstrap interval (percentiles) of the mean of values (cells,); NaN for fewer than two."""
    n = len(values)
    if n < 2:
        return np.nan, np.nan
    step = max(1, _MAX_DRAWS // n)
    means = [
        values[rng.integers(n, size=(min(step, N_RESAMPLES - start), n))].mean(1)
        for start in range(0, N_RESAMPLES, step)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def add_null(table: pd.DataFrame, null: np.ndarray) -> pd.DataFrame:
    """Add how the mean of each row compares with the mean shifts by its random genes (rows, genes)."""
    z, p = compare_with_null(table["mean"].to_numpy(), null.T)
    is_known = ~np.isnan(null)
    with np.errstate(invalid="ignore"):
        null_mean = np.where(is_known, null, 0).sum(1) / is_known.sum(1)
    return table.assign(null_mean=null_mean, z=z, p=p, q=adjusted(p))
