"""Mean probabilities over the cells of a group, with standard errors."""

import numpy as np


def log_mean(log_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the log of the mean probability over cells, and its standard error, each (genes,), float64.

    The standard error of log m is that of the mean m, divided by m (the delta method); NaN for a single cell.

    Parameters
    ----------
    log_p
        Log-probabilities (cells, genes).
    """
    p = np.exp(log_p.astype(np.float64))
    mean = p.mean(0)
    return np.log(mean), _standard_error(p / mean)


def log_ratio_of_means(log_p: np.ndarray, log_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log(mean p / mean q) over the same cells, and its standard error, each (genes,), float64.

    Parameters
    ----------
    log_p, log_q
        Log-probabilities (cells, genes), paired by cell.
    """
    p, q = np.exp(log_p.astype(np.float64)), np.exp(log_q.astype(np.float64))
    mean_p, mean_q = p.mean(0), q.mean(0)
    return np.log(mean_p) - np.log(mean_q), _standard_error(p / mean_p - q / mean_q)


def _standard_error(values: np.ndarray) -> np.ndarray:
    n = len(values)
    return values.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.full(values.shape[1], np.nan)
