"""Generated cells and imputed genes of the demo's model beside baselines, on its held-out cells.

    python scripts/generated_cells.py

- Two-sample test: accuracy of a 15-nearest-neighbor classifier (5-fold, 50 principal components of log-normalized
  counts of both) that tells generated cells from the held-out ones; 0.5 if it cannot. Generated cells take numbers of
  genes and total counts from the held-out ones. The baseline draws as many genes, without repetition, by their
  frequency among the training cells, and the count of each from a random training cell that expresses it.
- Imputation: a random half of the genes of each held-out cell is hidden. Per cell: area under the ROC curve of the
  hidden genes among all genes that are not shown, ranked by the probability to be next; rank correlation (Spearman),
  mean absolute error and mean squared error of the expected counts of the hidden genes, and of their rates μ. The
  baseline ranks genes by their frequency, and predicts their mean count where they are expressed, among the training
  cells.
"""

import anndata
import numpy as np
import pandas as pd
from scipy import sparse, stats
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from transcriptformer.checkpoint.load import Checkpoint, load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.demo.cells import HELD_OUT, load_cells
from transcriptformer.demo.run import CHECKPOINT
from transcriptformer.generation.generate import generate
from transcriptformer.generation.impute import impute

SEED, N_NEIGHBORS, N_COMPONENTS = 0, 15, 50


def main() -> None:
    """Print both tables."""
    options = {"model.inference_config.device": "cpu", "model.inference_config.precision": "32"}
    model = load_checkpoint(CHECKPOINT, load_config(CHECKPOINT, options))
    cells = load_cells()[:, list(model.gene_vocab.genes)].copy()
    is_held_out = cells.obs[HELD_OUT].to_numpy()
    real, train = cells[is_held_out].copy(), cells[~is_held_out].X.toarray()
    generated = generate(model, like=real, seed=SEED).X.toarray()
    drawn = by_frequency(train, (real.X.toarray() > 0).sum(1))
    print("two-sample accuracy:")
    for name, of_cells in (("generated", generated), ("by frequency", drawn)):
        print(f"  {name}: {two_sample_accuracy(real.X.toarray(), of_cells):.3f}")
    table = imputation(model, real, train)
    print("imputation, mean ± standard error over cells:")
    for measure in table.columns.astype(str):
        print(f"  {measure}: {table[measure].mean():.3f} ± {table[measure].sem():.3f}")


def by_frequency(train: np.ndarray, n_genes: np.ndarray) -> np.ndarray:
    """Draw cells gene by gene from the frequencies of genes (cells, genes)."""
    random, frequency = np.random.default_rng(SEED), (train > 0).mean(0)
    drawn = np.zeros((len(n_genes), train.shape[1]), np.float32)
    for row, n in zip(drawn, n_genes, strict=True):
        for gene in random.choice(len(frequency), n, replace=False, p=frequency / frequency.sum()):
            row[gene] = random.choice(train[train[:, gene] > 0, gene])
    return drawn


def two_sample_accuracy(real: np.ndarray, other: np.ndarray) -> float:
    """Return the accuracy of telling `other` cells from real ones (cells, genes)."""
    counts, labels = np.vstack([real, other]), np.repeat([0, 1], [len(real), len(other)])
    values = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    components = PCA(N_COMPONENTS, random_state=SEED).fit_transform(values)
    folds = StratifiedKFold(5, shuffle=True, random_state=SEED)
    return float(cross_val_score(KNeighborsClassifier(N_NEIGHBORS), components, labels, cv=folds).mean())


def imputation(model: Checkpoint, real: anndata.AnnData, train: np.ndarray) -> pd.DataFrame:
    """Hide half of the genes of each cell, and compare what is predicted (cells, measures)."""
    random, counts = np.random.default_rng(SEED), real.X.toarray()
    is_hidden = (counts > 0) & (random.random(counts.shape) < 0.5)
    shown = anndata.AnnData(sparse.csr_matrix(np.where(is_hidden, 0, counts)), obs=real.obs, var=real.var)
    imputed = impute(shown, model)
    frequency = (train > 0).mean(0)
    mean = np.divide(train.sum(0), (train > 0).sum(0), out=np.ones(train.shape[1]), where=frequency > 0)
    rows = []
    for i in range(len(counts)):
        asked, hidden = shown.X[[i]].toarray()[0] == 0, is_hidden[i]
        seen, probability, rate = counts[i, hidden], imputed.layers["probability"][i], imputed.layers["rate"][i]
        predictions = {
            "model": (probability, imputed.X[i]),
            "rate": (probability, rate),
            "baseline": (frequency, mean),
        }
        row = {}
        for name, (rank, expected) in predictions.items():
            row[f"AUC, {name}"] = roc_auc_score(hidden[asked], rank[asked])
            row[f"Spearman of counts, {name}"] = stats.spearmanr(expected[hidden], seen).statistic
            row[f"absolute error of counts, {name}"] = np.abs(expected[hidden] - seen).mean()
            row[f"squared error of counts, {name}"] = np.square(expected[hidden] - seen).mean()
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
