"""The Python API as it is used in a notebook."""

import logging
from pathlib import Path

import anndata
import numpy as np
import pytest

import transcriptformer as tf
from tests.golden_cases import CELLS, CHECKPOINT, SYNTHETIC, TOLERANCE, relative_error
from tests.h5ad_files import make_adata, random_adata
from transcriptformer.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return tf.load(CHECKPOINT, device="cpu", precision="32")


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return np.load(SYNTHETIC / "expected" / "cell.npz")["embeddings"]


@pytest.fixture
def cells() -> anndata.AnnData:
    return anndata.read_h5ad(CELLS)


def test_embeddings_are_added_beside_the_counts(
    cells: anndata.AnnData, model: Checkpoint, expected: np.ndarray
) -> None:
    before = cells.copy()
    assert tf.embed(cells, model) is None
    assert relative_error(cells.obsm["X_transcriptformer"], expected) < TOLERANCE
    np.testing.assert_array_equal(cells.X.toarray(), before.X.toarray())
    assert cells.obs.equals(before.obs)
    assert cells.uns["X_transcriptformer"]["checkpoint"] == "checkpoint"


def test_a_copy_leaves_the_input_alone(cells: anndata.AnnData, model: Checkpoint, expected: np.ndarray) -> None:
    result = tf.embed(cells, model, copy=True, key_added="X_tf")
    assert result is not None
    assert relative_error(result.obsm["X_tf"], expected) < TOLERANCE
    assert "X_tf" not in cells.obsm


@pytest.mark.filterwarnings("ignore:Setting element:anndata.ImplicitModificationWarning")
def test_a_view_is_embedded_row_by_row(cells: anndata.AnnData, model: Checkpoint, expected: np.ndarray) -> None:
    view = cells[[5, 2, 9]]
    tf.embed(view, model)
    assert relative_error(view.obsm["X_transcriptformer"], expected[[5, 2, 9]]) < TOLERANCE
    assert "X_transcriptformer" not in cells.obsm


def test_a_backed_anndata_stays_backed(model: Checkpoint, expected: np.ndarray, tmp_path: Path) -> None:
    anndata.read_h5ad(CELLS).write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    tf.embed(backed, model)
    assert backed.isbacked
    assert relative_error(backed.obsm["X_transcriptformer"], expected) < TOLERANCE
    tf_of_view = tf.embed(backed[4:8].to_memory(), model, copy=True)
    assert tf_of_view is not None
    assert relative_error(tf_of_view.obsm["X_transcriptformer"], expected[4:8]) < TOLERANCE


def test_files_give_a_new_anndata(model: Checkpoint, expected: np.ndarray) -> None:
    for data in (str(CELLS), CELLS, [CELLS]):
        result = tf.embed(data, model)
        assert result is not None
        assert relative_error(result.obsm["X_transcriptformer"], expected) < TOLERANCE
        assert list(result.obs.columns) == list(anndata.read_h5ad(CELLS, backed="r").obs.columns)


def test_counts_may_be_in_a_layer_or_in_raw(cells: anndata.AnnData, model: Checkpoint, expected: np.ndarray) -> None:
    cells.layers["counts"] = cells.X.copy()
    cells.X = cells.X.log1p()
    tf.embed(cells, model, layer="counts")
    assert relative_error(cells.obsm["X_transcriptformer"], expected) < TOLERANCE
    with_raw = cells.copy()
    with_raw.X = cells.layers["counts"]
    with_raw.raw = with_raw
    with_raw.X = cells.X
    tf.embed(with_raw, model)
    assert relative_error(with_raw.obsm["X_transcriptformer"], expected) < TOLERANCE
    with pytest.raises(tf.TranscriptFormerError, match="has no layer 'spliced'; there are: counts"):
        tf.embed(cells, model, layer="spliced")
    with pytest.raises(tf.TranscriptFormerError, match="one of them only"):
        tf.embed(cells, model, layer="counts", use_raw=True)


def test_gene_ids_are_found_in_the_index(model: Checkpoint) -> None:
    adata = random_adata(4)
    tf.embed(adata, model)
    by_index = adata.copy()
    by_index.var.index = by_index.var.pop("ensembl_id")
    tf.embed(by_index, model)
    np.testing.assert_array_equal(by_index.obsm["X_transcriptformer"], adata.obsm["X_transcriptformer"])


def test_cells_that_filters_leave_out_have_no_embedding(caplog: pytest.LogCaptureFixture) -> None:
    model = tf.load(
        CHECKPOINT,
        device="cpu",
        precision="32",
        settings={
            "model.data_config.min_expressed_genes": 2,
            "model.inference_config.output_keys": ["embeddings", "llh"],
        },
    )
    adata = make_adata([[1, 1], [1, 0], [2, 3]])
    with caplog.at_level(logging.INFO):
        tf.embed(adata, model)
    assert np.isnan(adata.obsm["X_transcriptformer"]).all(axis=1).tolist() == [False, True, False]
    assert adata.obs["X_transcriptformer_llh"].isna().tolist() == [False, True, False]
    assert "2 cells of 3" in caplog.text


def test_gene_embeddings_are_pooled_by_gene_and_by_group(cells: anndata.AnnData, model: Checkpoint) -> None:
    golden = np.load(SYNTHETIC / "expected" / "cge.npz")
    every = tf.gene_embeddings(cells, model, pool=None)
    assert relative_error(every.obsm["embeddings"], golden["cge_embeddings"]) < TOLERANCE
    assert every.obs["gene"].tolist() == golden["cge_gene_names"].tolist()
    assert every.obs["cell"].tolist() == cells.obs_names[golden["cge_cell_indices"]].tolist()

    by_gene = tf.gene_embeddings(cells, model)
    gene = by_gene.obs_names[7]
    of_gene = golden["cge_gene_names"] == gene
    np.testing.assert_allclose(
        by_gene[gene].obsm["embeddings"][0], golden["cge_embeddings"][of_gene].mean(0), rtol=1e-3, atol=1e-5
    )
    assert by_gene.obs.loc[gene, "n_cells"] == of_gene.sum()

    by_assay = tf.gene_embeddings(cells, model, pool="assay")
    assert by_assay.obs["n_cells"].sum() == len(golden["cge_gene_names"])
    assert set(by_assay.obs["assay"]) <= set(cells.obs["assay"])


def test_a_new_species_needs_its_protein_embeddings(model: Checkpoint) -> None:
    other = SYNTHETIC / "other_species.h5ad"
    with pytest.raises(tf.TranscriptFormerError, match=r"another species \(mus_musculus\).*--pretrained-embedding"):
        tf.embed(other, model)
    model = tf.load(CHECKPOINT, device="cpu", precision="32", pretrained_embedding=SYNTHETIC / "other_species_gene.h5")
    result = tf.embed(other, model)
    assert result is not None
    expected = np.load(SYNTHETIC / "expected" / "new_species.npz")["embeddings"]
    assert relative_error(result.obsm["X_transcriptformer"], expected) < TOLERANCE


def test_the_public_names_are_listed() -> None:
    assert {"load", "embed", "gene_embeddings", "TranscriptFormerError"} <= set(dir(tf))
    assert tf.__version__
    with pytest.raises(AttributeError, match="no attribute 'embedding'"):
        tf.embedding  # noqa: B018
