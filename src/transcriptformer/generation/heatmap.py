"""Clustered heatmap of pointwise mutual information."""

from pathlib import Path

import anndata
import numpy as np
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage

from transcriptformer.errors import UsageError
from transcriptformer.generation.next_genes import PMI_KEY, SYMBOL_COLUMN
from transcriptformer.generation.picture import save

MAX_ROWS, MAX_COLUMNS = 60, 60
"""Maximum number of rows and genes shown, those with the largest values."""


def check_size(n_rows: float, n_genes: float) -> None:
    """Raise UsageError if there are fewer than two rows or genes to cluster."""
    if min(n_rows, n_genes) < 2:
        raise UsageError("--plot: a heatmap needs at least two rows and two genes")


def draw(result: anndata.AnnData, path: Path) -> None:
    """Plot `layers['pmi']` with rows and genes in the order of average-linkage clustering.

    Of large results, the rows and genes with the largest mean absolute value are shown. Missing values are gray.

    Raises
    ------
    TranscriptFormerError
        If there are fewer than two rows or genes, or the picture cannot be written.
    """
    check_size(*result.shape)
    values = np.asarray(result.layers[PMI_KEY], np.float64)
    filled = np.nan_to_num(values)  # of a gene and itself: no information
    columns = _largest(np.abs(filled).mean(0), MAX_COLUMNS)
    rows = _largest(np.abs(filled[:, columns]).mean(1), MAX_ROWS)
    filled = filled[np.ix_(rows, columns)]
    rows, columns = rows[_clustered(filled)], columns[_clustered(filled.T)]
    limit = float(np.abs(filled).max()) or 1.0
    n_rows, n_columns = len(rows), len(columns)
    figure = Figure(figsize=(3 + 0.2 * n_columns, 2 + 0.2 * n_rows), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("lightgray")
    image = axes.imshow(values[np.ix_(rows, columns)], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(n_columns), gene_labels(result)[columns], rotation=90, fontsize=7)
    axes.set_yticks(range(n_rows), _row_labels(result)[rows], fontsize=7)
    axes.set(xlabel="next gene", ylabel="after")
    figure.colorbar(image, label="PMI (nats)", shrink=0.6)
    save(figure, path)


def gene_labels(result: anndata.AnnData) -> np.ndarray:
    """Return the symbol of each gene (genes,), or its id if it has none."""
    symbols = result.var[SYMBOL_COLUMN].to_numpy().astype(str)
    return np.where(symbols == "", result.var_names.to_numpy().astype(str), symbols)


def _row_labels(result: anndata.AnnData) -> np.ndarray:
    names = result.obs_names.to_numpy().astype(str)
    if SYMBOL_COLUMN not in result.obs:
        return names
    pairs = zip(names, result.obs["source"], result.obs[SYMBOL_COLUMN], strict=True)
    return np.array([name.replace(source, symbol or source) for name, source, symbol in pairs])


def _largest(values: np.ndarray, n: int) -> np.ndarray:
    """Return the indices of the `n` largest values, ascending."""
    return np.sort(np.argsort(-values, kind="stable")[:n])


def _clustered(values: np.ndarray) -> np.ndarray:
    """Return the order of the rows by average linkage."""
    return leaves_list(linkage(values, "average", optimal_ordering=True))
