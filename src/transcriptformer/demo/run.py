"""Embed the demo's cells, tell how well the held-out ones can be classified, and draw all of them."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import anndata
import numpy as np
import scanpy as sc
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier

from transcriptformer.checkpoint.published import load_config
from transcriptformer.demo.cells import CELL_TYPE, HELD_OUT, SEED, load_cells, log_normalized
from transcriptformer.errors import OutputError, one_line
from transcriptformer.inference.output import EMBEDDINGS_KEY
from transcriptformer.inference.recording import OnProgress
from transcriptformer.inference.run import run

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The model that comes with the package."""

N_NEIGHBORS = 15
N_COMPONENTS = 50


class Score(NamedTuple):
    """How well the nearest neighbours among the cells of the training tell the type of those held out."""

    accuracy: float
    macro_f1: float


class Demo(NamedTuple):
    """What the demo has made.

    Attributes
    ----------
    embeddings, picture
        Files.
    n_held_out
        Cells that were classified.
    score, pca_score
        By the embeddings, and by principal components of log-normalized counts.
    """

    embeddings: Path
    picture: Path
    n_held_out: int
    score: Score
    pca_score: Score


def run_demo(folder: Path, on_progress: OnProgress | None = None) -> Demo:
    """Run `inference` with the model that comes with the package on all 700 cells, and write a picture beside.

    Raises
    ------
    TranscriptFormerError
        If the folder cannot be written to.
    """
    cells = load_cells()
    picture = folder / "umap.png"
    options = {"output_path": str(folder), "precision": "32", "device": "cpu"}
    config = load_config(CHECKPOINT, {f"model.inference_config.{key}": value for key, value in options.items()})
    config.model.data_config.gene_col_name = "index"
    try:
        with TemporaryDirectory() as temporary:
            source = Path(temporary) / "pbmc68k_reduced.h5ad"
            cells.write_h5ad(source)
            embeddings = run([source], CHECKPOINT, config, on_progress)
        assert embeddings is not None
        embedded = anndata.read_h5ad(embeddings)
        draw(embedded, picture)
    except OSError as error:
        raise OutputError(f"--output-path {folder}: cannot be written to ({one_line(error)})") from error
    held_out = cells.obs[HELD_OUT].to_numpy()
    labels = cells.obs[CELL_TYPE].astype(str).to_numpy()
    counts = log_normalized(cells).X.toarray()
    components = PCA(N_COMPONENTS, random_state=SEED).fit(counts[~held_out]).transform(counts)
    vectors = np.asarray(embedded.obsm[EMBEDDINGS_KEY])
    scores = (classify(values, labels, held_out) for values in (vectors, components))
    return Demo(embeddings, picture, int(held_out.sum()), *scores)


def classify(vectors: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> Score:
    """Tell the labels (cells,) of the cells held out by the majority of their nearest neighbours among the others."""
    neighbors = KNeighborsClassifier(N_NEIGHBORS).fit(vectors[~held_out], labels[~held_out])
    told, right = neighbors.predict(vectors[held_out]), labels[held_out]
    return Score(float(accuracy_score(right, told)), float(f1_score(right, told, average="macro")))


def draw(embedded: anndata.AnnData, picture: Path) -> None:
    """Draw a UMAP of the embeddings, coloured by cell type; cells that were held out have a dark edge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # UMAP's about its own seed
        sc.pp.neighbors(embedded, n_neighbors=N_NEIGHBORS, use_rep=EMBEDDINGS_KEY)
        sc.tl.umap(embedded, random_state=SEED)
    places, held_out = embedded.obsm["X_umap"], embedded.obs[HELD_OUT].to_numpy()
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.subplots()
    colors = sc.pl.palettes.default_20
    for color, cell_type in zip(colors, embedded.obs[CELL_TYPE].cat.categories, strict=False):
        of_type = (embedded.obs[CELL_TYPE] == cell_type).to_numpy()
        for edge, chosen in (("none", of_type & ~held_out), ("black", of_type & held_out)):
            label = cell_type if edge == "none" else None
            x, y = places[chosen].T
            axes.scatter(x, y, s=16, color=color, edgecolors=edge, linewidths=0.7, label=label)
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    axes.set_title("700 blood cells by transcriptformer's demo model (dark edge: held out)", fontsize=10)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(picture, dpi=150)
