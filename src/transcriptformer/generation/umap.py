"""UMAP of real and generated cells, from log-normalized counts."""

import warnings
from pathlib import Path

import anndata
import numpy as np
import scanpy as sc
from matplotlib.figure import Figure
from scipy import sparse

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.tokenize import Tokens
from transcriptformer.errors import UsageError
from transcriptformer.generation.picture import save
from transcriptformer.generation.prompts import require_gene_head
from transcriptformer.generation.real_cells import Source, opened_cells

MIN_CELLS, N_NEIGHBORS, N_COMPONENTS = 20, 15, 50


def draw_umap(generated: anndata.AnnData, real: Source, checkpoint: Checkpoint, seed: int, path: Path) -> None:
    """Plot a UMAP of generated cells and the real ones, both with the genes and counts that the model sees.

    Raises
    ------
    TranscriptFormerError
        If there are too few cells, or the picture cannot be written.
    """
    counts = sparse.vstack([real_counts(real, checkpoint, seed), generated.X]).tocsr()
    n_real = counts.shape[0] - generated.n_obs
    check_number(counts.shape[0])
    seed %= 2**32  # scanpy takes no larger ones
    cells = anndata.AnnData(counts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # UMAP warns about its seed
        sc.pp.normalize_total(cells, target_sum=1e4)
        sc.pp.log1p(cells)
        sc.pp.pca(cells, n_comps=min(N_COMPONENTS, min(cells.shape) - 1), random_state=seed)
        sc.pp.neighbors(cells, n_neighbors=N_NEIGHBORS, random_state=seed)
        sc.tl.umap(cells, random_state=seed)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    order = np.random.default_rng(seed).permutation(cells.n_obs)  # so that neither kind hides the other
    x, y = cells.obsm["X_umap"][order].T
    colors = np.where(order < n_real, "#8a8a8a", "#d1495b")
    axes.scatter(x, y, s=10, c=colors, linewidths=0)
    for name, color in (("real", "#8a8a8a"), ("generated", "#d1495b")):
        axes.scatter([], [], color=color, label=name)
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    axes.set_title(f"{n_real} real and {generated.n_obs} generated cells", fontsize=10)
    axes.legend(frameon=False)
    save(figure, path)


def check_number(n_cells: int) -> None:
    """Raise UsageError if there are too few real and generated cells."""
    if n_cells < MIN_CELLS:
        raise UsageError(f"--plot: {n_cells} real and generated cells; a UMAP needs at least {MIN_CELLS}")


def real_counts(source: Source, checkpoint: Checkpoint, seed: int) -> sparse.csr_matrix:
    """Return the counts of real cells (cells, genes of the vocabulary), as the model sees them."""
    with opened_cells(source, checkpoint, seed, require_gene_head(checkpoint).max_genes) as real:
        tokens = Tokens.join([cells.tokens for cells in real.blocks()])
    n_special, n_genes = len(checkpoint.gene_vocab.special_tokens), len(checkpoint.gene_vocab.genes)
    return sparse.csr_matrix((tokens.counts, tokens.genes - n_special, tokens.offsets), (len(tokens.lengths), n_genes))
