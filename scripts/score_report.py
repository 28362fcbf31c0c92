"""Compare the likelihood of the demo's held-out cells with simple baselines, and print the figures of docs/score.md."""

import anndata
import numpy as np
from scipy import sparse
from sklearn.metrics import roc_auc_score

import transcriptformer as tf
from transcriptformer.demo.cells import CELL_TYPE, HELD_OUT, load_cells
from transcriptformer.demo.run import CHECKPOINT

ORDERS = 4


def main() -> None:
    """Score held-out cells, doublets and shuffled cells."""
    model = tf.load(CHECKPOINT, device="cpu", precision="32", settings={"model.data_config.gene_col_name": "index"})
    cells = load_cells()
    is_held_out = cells.obs[HELD_OUT].to_numpy()
    held_out = cells[is_held_out].copy()
    frequency = np.asarray((cells[~is_held_out].X > 0).sum(0)).ravel() + 1.0
    frequency /= frequency.sum()
    rng = np.random.default_rng(0)
    others = {"doublets": doublets(held_out, rng), "shuffled": shuffled(held_out, rng)}
    for adata in (held_out, *others.values()):
        tf.score(adata, model, orders=ORDERS)
    print("model", held_out.obs[["gene_nll", "gene_nll_se", "count_nll", "perplexity"]].mean().round(4).to_dict())
    print("frequencies", by_frequency(held_out, frequency, repeats=True).mean().round(4))
    print("frequencies without repetition", by_frequency(held_out, frequency, repeats=False).mean().round(4))
    for name, adata in others.items():
        is_other = np.r_[np.zeros(held_out.n_obs), np.ones(adata.n_obs)]
        measures = {
            "gene_nll": [both.obs["gene_nll"] for both in (held_out, adata)],
            "number of genes": [n_genes(both) for both in (held_out, adata)],
            "frequencies": [by_frequency(both, frequency, repeats=False) for both in (held_out, adata)],
        }
        aucs = {key: round(roc_auc_score(is_other, np.concatenate(values)), 3) for key, values in measures.items()}
        print(f"{name}: gene_nll {adata.obs['gene_nll'].mean():.3f}; AUC against held-out cells {aucs}")


def n_genes(adata: anndata.AnnData) -> np.ndarray:
    """Return the number of genes of each cell (cells,)."""
    return np.asarray((adata.X > 0).sum(1)).ravel()


def doublets(adata: anndata.AnnData, rng: np.random.Generator) -> anndata.AnnData:
    """Add to each cell one of another type."""
    types = adata.obs[CELL_TYPE].astype(str).to_numpy()
    partners = [rng.choice(np.flatnonzero(types != of_cell)) for of_cell in types]
    return anndata.AnnData(sparse.csr_matrix(adata.X + adata.X[partners]), var=adata.var)


def shuffled(adata: anndata.AnnData, rng: np.random.Generator) -> anndata.AnnData:
    """Shuffle the counts of each cell among all genes."""
    return anndata.AnnData(sparse.csr_matrix(rng.permuted(adata.X.toarray(), axis=1)), var=adata.var)


def by_frequency(adata: anndata.AnnData, frequency: np.ndarray, repeats: bool) -> np.ndarray:
    """Mean surprise of a cell's genes (cells,), if genes are drawn by frequency, with or without repetition."""
    surprise = []
    for row in adata.X.toarray() > 0:
        genes, rng = np.flatnonzero(row), np.random.default_rng(0)
        orders = frequency[np.stack([rng.permutation(genes) for _ in range(ORDERS)])]  # (orders, genes)
        left = np.ones_like(orders) if repeats else 1 - np.cumsum(orders, 1) + orders
        surprise.append(-np.log(orders / left).mean())
    return np.array(surprise)


if __name__ == "__main__":
    main()
