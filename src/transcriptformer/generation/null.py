"""Random sources of like expression, and how a PMI compares with theirs."""

import numpy as np
from scipy.stats import false_discovery_control

from transcriptformer.errors import UsageError

MIN_NULL = 10
"""Minimum number of random sources of a null."""

NEIGHBORS_PER_NULL = 5
"""Genes nearest in expression from which a random source is drawn, per random source."""


def check_null(null: int, option: str) -> None:
    """Raise UsageError for a null of too few random sources."""
    if null and null < MIN_NULL:
        raise UsageError(f"{option} {null}: too few random sources; give at least {MIN_NULL}, or 0 for no null")


def draw_alike(expression: np.ndarray, own: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `n` genes from those nearest to a source in expression; return their indices.

    Parameters
    ----------
    expression, own
        Expression of the genes to draw from (genes,), and of the source (1,).
    """
    order = rng.permutation(len(expression))  # so that ties, such as unexpressed genes, are drawn alike
    nearest = order[np.argsort(np.abs(expression[order] - own), kind="stable")][: NEIGHBORS_PER_NULL * n]
    return rng.choice(nearest, n, replace=False)


def compare_with_null(values: np.ndarray, null: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return z-scores and two-sided empirical p-values (targets,), float32; NaN where PMI is.

    With n random sources, p = 2 (1 + min(#{null ≥ PMI}, #{null ≤ PMI})) / (n + 1), at most 1.

    Parameters
    ----------
    values
        PMI of a source (targets,).
    null
        PMI of the random sources (sources, targets), NaN where a source is the target.
    """
    is_valid = np.isfinite(null)
    n = is_valid.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(is_valid, null, 0).sum(0) / n
        deviation = np.sqrt(np.where(is_valid, (null - mean) ** 2, 0).sum(0) / (n - 1))
        z = np.where(deviation > 0, (values - mean) / deviation, np.nan)
    n_beyond = np.minimum((null >= values).sum(0), (null <= values).sum(0))  # false for NaN
    p = np.where(np.isfinite(values) & (n > 0), np.minimum(1, 2 * (1 + n_beyond) / (n + 1)), np.nan)
    return z.astype(np.float32), p.astype(np.float32)


def adjusted(p: np.ndarray) -> np.ndarray:
    """Adjust p-values by Benjamini-Hochberg over the whole table (rows, targets), float32; NaN stay."""
    q, is_valid = np.full(p.shape, np.nan, np.float32), np.isfinite(p)
    if is_valid.any():
        q[is_valid] = false_discovery_control(p[is_valid])
    return q
