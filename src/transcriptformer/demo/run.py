"""Embed the demo cells, classify the held-out ones and plot a UMAP."""

import warnings
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import scanpy as sc
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier

from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.demo.cells import CELL_TYPE, HELD_OUT, SEED, load_cells, log_normalized
from transcriptformer.inference.embeddings import EMBEDDINGS_KEY
from transcriptformer.inference.run import embed
from transcriptformer.runs.output import write_anndata
from transcriptformer.runs.recording import OnProgress
from transcriptformer.storage.atomic import check_writable, writing

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The demo checkpoint shipped with the package."""

N_NEIGHBORS = 15
N_COMPONENTS = 50


class Score(NamedTuple):
    """Cell-type classification scores of k-nearest neighbors on held-out cells."""

    accuracy: float
    macro_f1: float


class Demo(NamedTuple):
    """Files and scores of a demo run.

    Attributes
    ----------
    embeddings, picture
        Paths of the embeddings and the UMAP plot.
    n_held_out
        Number of classified cells.
    score, pca_score
        Scores of the embeddings, and of PCA on log-normalized counts.
    """

    embeddings: Path
    picture: Path
    n_held_out: int
    score: Score
    pca_score: Score


def run_demo(folder: Path, on_progress: OnProgress | None = None) -> Demo:
    """Embed all 700 cells with the shipped checkpoint, score them and plot a UMAP next to the embeddings.

    Raises
    ------
    TranscriptFormerError
        If the folder cannot be written to.
    """
    cells = load_cells()
    embeddings, picture = folder / "embeddings.h5ad", folder / "umap.png"
    check_writable(embeddings)
    options = {"precision": "32", "device": "cpu"}
    config = load_config(CHECKPOINT, {f"model.inference_config.{key}": value for key, value in options.items()})
    config.model.data_config.gene_col_name = "index"
    embedded = embed(cells, load_checkpoint(CHECKPOINT, config), on_progress)
    write_anndata(embedded, embeddings)
    with writing(picture):
        draw(embedded, picture)
    held_out = cells.obs[HELD_OUT].to_numpy()
    labels = cells.obs[CELL_TYPE].astype(str).to_numpy()
    counts = log_normalized(cells).X.toarray()
    components = PCA(N_COMPONENTS, random_state=SEED).fit(counts[~held_out]).transform(counts)
    vectors = np.asarray(embedded.obsm[EMBEDDINGS_KEY])
    scores = (classify(values, labels, held_out) for values in (vectors, components))
    return Demo(embeddings, picture, int(held_out.sum()), *scores)


def classify(vectors: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> Score:
    """Score majority-vote k-nearest-neighbor predictions of the held-out labels (cells,)."""
    neighbors = KNeighborsClassifier(N_NEIGHBORS).fit(vectors[~held_out], labels[~held_out])
    predicted, expected = neighbors.predict(vectors[held_out]), labels[held_out]
    return Score(float(accuracy_score(expected, predicted)), float(f1_score(expected, predicted, average="macro")))


def draw(embedded: anndata.AnnData, picture: Path) -> None:
    """Plot a UMAP of the embeddings, colored by cell type; held-out cells have a dark edge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # UMAP warns about its seed
        sc.pp.neighbors(embedded, n_neighbors=N_NEIGHBORS, use_rep=EMBEDDINGS_KEY)
        sc.tl.umap(embedded, random_state=SEED)
    coordinates, held_out = embedded.obsm["X_umap"], embedded.obs[HELD_OUT].to_numpy()
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.subplots()
    colors = sc.pl.palettes.default_20
    for color, cell_type in zip(colors, embedded.obs[CELL_TYPE].cat.categories, strict=False):
        of_type = (embedded.obs[CELL_TYPE] == cell_type).to_numpy()
        for edge, chosen in (("none", of_type & ~held_out), ("black", of_type & held_out)):
            label = cell_type if edge == "none" else None
            x, y = coordinates[chosen].T
            axes.scatter(x, y, s=16, color=color, edgecolors=edge, linewidths=0.7, label=label)
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    axes.set_title("700 blood cells, embedded by the transcriptformer demo model (dark edge: held out)", fontsize=10)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(picture, dpi=150)
