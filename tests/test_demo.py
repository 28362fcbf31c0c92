"""The demo: counts are recovered, the split is stratified, and the printed scores are correct."""

import re
from pathlib import Path

import anndata
import numpy as np
import pytest
import scanpy as sc
from sklearn.neighbors import KNeighborsClassifier
from typer.testing import CliRunner

from transcriptformer.checkpoint.published import load_config
from transcriptformer.checkpoint.vocabs import read_gene_ids
from transcriptformer.cli.main import app
from transcriptformer.demo.cells import CELL_TYPE, HELD_OUT, N_HELD_OUT, coexpression_features, load_cells
from transcriptformer.demo.run import CHECKPOINT, classify


@pytest.mark.filterwarnings("ignore:Observation names are not unique", "ignore::FutureWarning", "ignore::UserWarning")
def test_counts_are_integers_that_normalize_to_the_shipped_values() -> None:
    cells = load_cells()
    shipped = sc.datasets.pbmc68k_reduced().raw.X.toarray()
    counts = cells.X.toarray()
    assert counts.shape == (700, 765)
    assert (counts == np.rint(counts)).all()
    assert (counts[counts > 0].min(), np.ptp(counts.astype(bool).sum(1)) > 0) == (1, True)
    one_count = np.expm1(np.where(shipped > 0, shipped, np.inf)).min(1, keepdims=True)
    np.testing.assert_allclose(np.log1p(counts * one_count), shipped, atol=2e-3)


def test_about_a_fifth_of_each_cell_type_is_held_out() -> None:
    obs = load_cells().obs
    assert obs[HELD_OUT].sum() == N_HELD_OUT
    assert obs.groupby(CELL_TYPE, observed=True)[HELD_OUT].mean().between(0.1, 0.3).all()


def test_the_checkpoint_has_the_genes_of_the_cells_but_not_their_types() -> None:
    vocabulary = read_gene_ids(CHECKPOINT / "vocabs" / "pbmc_coexpression.h5")
    assert vocabulary == list(load_cells().var_names)
    assert not (CHECKPOINT / "label_head.pt").exists()
    assert load_config(CHECKPOINT).model.data_config.aux_cols == []
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) < 4_000_000


def test_features_exclude_the_held_out_cells() -> None:
    from transcriptformer.checkpoint.vocabs import read_protein_embeddings

    cells = load_cells()
    features = coexpression_features(cells[~cells.obs[HELD_OUT]].copy())
    _, shipped = read_protein_embeddings([CHECKPOINT / "vocabs" / "pbmc_coexpression.h5"])
    # Signs of components depend on the linear-algebra library.
    np.testing.assert_allclose(np.abs(features @ features.T), np.abs(shipped @ shipped.T), atol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_command_embeds_plots_and_prints_scores(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--output-path", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "umap.png").read_bytes().startswith(b"\x89PNG")
    embedded = anndata.read_h5ad(tmp_path / "out" / "embeddings.h5ad")
    assert embedded.obsm["embeddings"].shape[0] == 700
    printed = [[float(x) for x in re.findall(r"\d\.\d{3}", line)] for line in result.stdout.splitlines()]
    scores = [numbers for numbers in printed if len(numbers) == 2]
    held_out, labels = embedded.obs[HELD_OUT].to_numpy(), embedded.obs[CELL_TYPE].astype(str).to_numpy()
    vectors = embedded.obsm["embeddings"]
    expected = (
        KNeighborsClassifier(15).fit(vectors[~held_out], labels[~held_out]).score(vectors[held_out], labels[held_out])
    )
    assert scores[0][0] == pytest.approx(expected, abs=6e-4)
    assert min(min(numbers) for numbers in scores) > 0.4


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["demo", "--output-path", str(tmp_path / "file" / "out")])
    assert result.exit_code in (1, 2)
    assert re.search(r"ERROR: --output-path .*out", result.stderr)


def test_classification_by_hand() -> None:
    vectors = np.array([[0.0], [0.1], [5.0], [5.1]] * 10)
    labels = np.array(["a", "a", "b", "b"] * 10)
    held_out = np.arange(40) < 4
    assert classify(vectors, labels, held_out) == (1.0, 1.0)
