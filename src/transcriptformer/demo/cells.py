"""Raw counts of the 700 blood cells shipped with scanpy (PBMC, Zheng et al. 2017), and gene features."""

import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse
from sklearn.model_selection import train_test_split

from transcriptformer.checkpoint.vocabs import write_protein_embeddings

CELL_TYPE, HELD_OUT = "cell_type", "held_out"
"""Columns of `obs`: the annotated cell type, and whether the cell was held out from training."""

N_HELD_OUT = 140
N_FEATURES = 64
SEED = 0


def load_cells() -> anndata.AnnData:
    """Load raw counts (700, 765), with cell types and the split in `obs` and gene symbols as the index of `var`.

    scanpy ships log1p of counts scaled to 10,000 per cell. Each cell's smallest nonzero value corresponds to a count
    of 1, from which the raw counts are recovered.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file was written by an early release of anndata
        shipped = sc.datasets.pbmc68k_reduced()
    values = sparse.csr_matrix(shipped.raw.X)
    scaled = np.expm1(values.data.astype(np.float64))
    one_count = np.minimum.reduceat(scaled, values.indptr[:-1])
    counts = np.rint(scaled / np.repeat(one_count, np.diff(values.indptr))).astype(np.float32)
    labels = shipped.obs["bulk_labels"]
    obs = pd.DataFrame({CELL_TYPE: labels, HELD_OUT: _choose_held_out(labels)}, index=shipped.obs_names)
    var = pd.DataFrame(index=pd.Index(shipped.raw.var_names, name="gene_symbol"))
    return anndata.AnnData(sparse.csr_matrix((counts, values.indices, values.indptr), values.shape), obs=obs, var=var)


def _choose_held_out(labels: pd.Series) -> np.ndarray:
    """Mask (cells,) of 140 held-out cells, stratified by cell type."""
    _, held_out = train_test_split(np.arange(len(labels)), test_size=N_HELD_OUT, stratify=labels, random_state=SEED)
    return np.isin(np.arange(len(labels)), held_out)


def log_normalized(cells: anndata.AnnData) -> anndata.AnnData:
    """Return a log-normalized copy: log1p of counts scaled to 10,000 per cell."""
    cells = cells.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return cells


def coexpression_features(cells: anndata.AnnData) -> np.ndarray:
    """Compute co-expression features (genes, features), float32, as a substitute for protein embeddings.

    They are the PCA loadings of standardized log-normalized counts, scaled by the components' standard deviations.
    Genes with similar features are expressed in the same cells.
    """
    values = log_normalized(cells).X.toarray()
    values = (values - values.mean(0)) / np.maximum(values.std(0), 1e-3)
    _, deviations, loadings = np.linalg.svd(values / np.sqrt(len(values)), full_matrices=False)
    return (loadings[:N_FEATURES].T * deviations[:N_FEATURES]).astype(np.float32)


def write_gene_features(path: Path, genes: pd.Index, features: np.ndarray) -> None:
    """Write features (genes, width) as protein embeddings."""
    with h5py.File(path, "w") as file:
        write_protein_embeddings(file, list(map(str, genes)), features)
