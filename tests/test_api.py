"""The Python API as used in a notebook."""

import logging
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch

import transcriptformer as tf
from tests.golden_cases import CELLS, CHECKPOINT, SYNTHETIC, TOLERANCE, relative_error
from tests.h5ad_files import make_adata, random_adata
from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.model.label_head import LabelHead

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting element:anndata.ImplicitModificationWarning"),
    pytest.mark.filterwarnings("ignore:Trying to modify attribute:anndata.ImplicitModificationWarning"),
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part in the Zarr format 3"),
]


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return tf.load(CHECKPOINT, device="cpu", precision="32")


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return np.load(SYNTHETIC / "expected" / "cell.npz")["embeddings"]


@pytest.fixture
def cells() -> anndata.AnnData:
    return anndata.read_h5ad(CELLS)


def test_embeddings_are_added_without_changing_the_counts(
    cells: anndata.AnnData, model: Checkpoint, expected: np.ndarray
) -> None:
    before = cells.copy()
    assert tf.embed(cells, model) is None
    assert relative_error(cells.obsm["X_transcriptformer"], expected) < TOLERANCE
    np.testing.assert_array_equal(cells.X.toarray(), before.X.toarray())
    assert cells.obs.equals(before.obs)
    assert cells.uns["X_transcriptformer"]["checkpoint"] == "checkpoint"


def test_a_copy_does_not_modify_the_input(cells: anndata.AnnData, model: Checkpoint, expected: np.ndarray) -> None:
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
    with pytest.raises(tf.TranscriptFormerError, match="has no layer 'spliced'; its layers are: counts"):
        tf.embed(cells, model, layer="spliced")
    with pytest.raises(tf.TranscriptFormerError, match="mutually exclusive; use only one of them"):
        tf.embed(cells, model, layer="counts", use_raw=True)


def test_gene_ids_are_found_in_the_index(model: Checkpoint) -> None:
    adata = random_adata(4)
    tf.embed(adata, model)
    by_index = adata.copy()
    by_index.var.index = by_index.var.pop("ensembl_id")
    tf.embed(by_index, model)
    np.testing.assert_array_equal(by_index.obsm["X_transcriptformer"], adata.obsm["X_transcriptformer"])


def test_filtered_cells_have_no_embedding(caplog: pytest.LogCaptureFixture) -> None:
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
    unpooled = tf.gene_embeddings(cells, model, pool=None)
    assert relative_error(unpooled.obsm["embeddings"], golden["cge_embeddings"]) < TOLERANCE
    assert unpooled.obs["gene"].tolist() == golden["cge_gene_names"].tolist()
    assert unpooled.obs["cell"].tolist() == cells.obs_names[golden["cge_cell_indices"]].tolist()

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


KINDS = ["in memory", "view", "backed", "h5ad", "zarr", "files"]
OF_ANNDATA = KINDS[:3]


def layered() -> anndata.AnnData:
    """Counts in X, doubled in a layer, tripled in .raw; gene ids and symbols in two columns."""
    adata = random_adata(6)
    adata.layers["double"] = adata.X * 2
    adata.var["symbol"] = [f"g{i}" for i in range(adata.n_vars)]
    adata.obs["donor"] = ["a", "b"] * 3
    raw = adata.copy()
    raw.X = adata.X * 3
    adata.raw = raw
    return adata


@pytest.fixture(scope="module")
def multiples(model: Checkpoint) -> dict[int, np.ndarray]:
    """Expected embeddings of the counts and of multiples of them."""
    found = {}
    for factor in (1, 2, 3):
        adata = random_adata(6)
        adata.X = adata.X * factor
        tf.embed(adata, model)
        found[factor] = adata.obsm["X_transcriptformer"]
    return found


def as_kind(adata: anndata.AnnData, kind: str, folder: Path) -> Any:
    """Convert cells to data of the given kind."""
    if kind == "in memory":
        return adata.copy()
    if kind == "view":
        return adata[:]
    folder.mkdir(exist_ok=True)
    if kind == "zarr":
        adata.write_zarr(folder / "cells.zarr")
        return folder / "cells.zarr"
    adata.write_h5ad(folder / "cells.h5ad")
    if kind == "backed":
        return anndata.read_h5ad(folder / "cells.h5ad", backed="r")
    return str(folder / "cells.h5ad") if kind == "h5ad" else [folder / "cells.h5ad"]


def embedded(data: Any, model: Checkpoint, **options: Any) -> anndata.AnnData:
    result = tf.embed(data, model, **options)
    return data if result is None else result


with_all_kinds = pytest.mark.parametrize("kind", KINDS)


@with_all_kinds
@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 3),
        ({"use_raw": True}, 3),
        ({"use_raw": False}, 1),
        ({"layer": "double"}, 2),
        ({"layer": "double", "use_raw": False}, 2),
        ({"gene_col_name": "ensembl_id"}, 3),
    ],
)
def test_counts_come_from_the_requested_place(
    kind: str, options: dict[str, Any], factor: int, model: Checkpoint, multiples: dict[int, np.ndarray], tmp_path: Path
) -> None:
    result = embedded(as_kind(layered(), kind, tmp_path), model, **options)
    np.testing.assert_allclose(result.obsm["X_transcriptformer"], multiples[factor], rtol=1e-5, atol=1e-6)


@with_all_kinds
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "spliced"}, "has no layer 'spliced'; its layers are: double"),
        ({"layer": ""}, "has no layer ''; its layers are: double"),
        ({"layer": "double", "use_raw": True}, "layer 'double' and use_raw=True are .*only one of them"),
        ({"use_raw": "yes"}, "use_raw .*'yes'"),
        ({"gene_col_name": "symbol"}, "none of its|no gene|not in the vocabulary"),
        ({"gene_col_name": "gene"}, "no column 'gene'"),
    ],
)
def test_missing_inputs_are_named(
    kind: str, options: dict[str, Any], message: str, model: Checkpoint, tmp_path: Path
) -> None:
    data = as_kind(layered(), kind, tmp_path)
    for function in (tf.embed, tf.gene_embeddings):
        with pytest.raises(tf.TranscriptFormerError, match=message):
            function(data, model, **options)


@pytest.mark.parametrize("kind", ["in memory", "h5ad"])
def test_gene_embeddings_take_the_same_options(
    kind: str, model: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adata = layered()
    data = as_kind(adata, kind, tmp_path)
    double = random_adata(6)
    double.X = double.X * 2
    for pool in ("gene", None):
        result = tf.gene_embeddings(data, model, layer="double", pool=pool)
        expected = tf.gene_embeddings(double, model, pool=pool)
        np.testing.assert_allclose(result.obsm["embeddings"], expected.obsm["embeddings"], rtol=1e-5, atol=1e-6)
    assert set(tf.gene_embeddings(data, model, pool="donor").obs["donor"]) == {"a", "b"}
    with pytest.raises(tf.TranscriptFormerError, match="--cge-pool tissue: obs has no such column"):
        tf.gene_embeddings(data, model, pool="tissue")


@with_all_kinds
def test_gene_ids_in_the_index_are_found_unless_a_column_is_named(
    kind: str, model: Checkpoint, multiples: dict[int, np.ndarray], tmp_path: Path
) -> None:
    adata = random_adata(6)
    adata.var.index = adata.var.pop("ensembl_id")
    adata.var.index.name = None
    adata.var["symbol"] = [f"g{i}" for i in range(adata.n_vars)]
    data = as_kind(adata, kind, tmp_path)
    np.testing.assert_array_equal(embedded(data, model).obsm["X_transcriptformer"], multiples[1])
    for column in ("symbol", "ensembl_id"):
        by_settings = tf.load(
            CHECKPOINT, device="cpu", precision="32", settings={"model.data_config.gene_col_name": column}
        )
        for gene_col_name, of_model in ((None, by_settings), (column, model)):
            with pytest.raises(tf.TranscriptFormerError, match=f"no column '{column}'|vocabulary"):
                tf.embed(data, of_model, gene_col_name=gene_col_name)


@with_all_kinds
def test_arguments_override_where_settings_say_counts_are(
    kind: str, multiples: dict[int, np.ndarray], tmp_path: Path
) -> None:
    model = tf.load(CHECKPOINT, device="cpu", precision="32", settings={"model.data_config.layer": "double"})
    for use_raw, factor in ((None, 2), (False, 1), (True, 3)):
        result = embedded(as_kind(layered(), kind, tmp_path / str(factor)), model, use_raw=use_raw)
        np.testing.assert_allclose(result.obsm["X_transcriptformer"], multiples[factor], rtol=1e-5, atol=1e-6)


@with_all_kinds
@pytest.mark.parametrize("key", ["", ".", "a/b", None, 3])
def test_an_unwritable_key_is_refused(kind: str, key: Any, model: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(tf.TranscriptFormerError, match=r"key_added=.*: must be a name without '/'"):
        tf.embed(as_kind(layered(), kind, tmp_path), model, key_added=key)


@with_all_kinds
def test_an_existing_key_is_overwritten(kind: str, model: Checkpoint, tmp_path: Path) -> None:
    adata = layered()
    adata.obsm["X_tf"] = np.zeros((6, 3))
    adata.uns["X_tf"] = "old"
    result = embedded(as_kind(adata, kind, tmp_path), model, key_added="X_tf")
    assert result.obsm["X_tf"].shape == (6, 32)
    assert "X_transcriptformer" not in result.obsm


@with_all_kinds
def test_a_copy_is_made_of_any_kind(
    kind: str, model: Checkpoint, multiples: dict[int, np.ndarray], tmp_path: Path
) -> None:
    data = as_kind(layered(), kind, tmp_path)
    result = tf.embed(data, model, copy=True)
    assert result is not None
    np.testing.assert_allclose(result.obsm["X_transcriptformer"], multiples[3], rtol=1e-5, atol=1e-6)
    if kind in OF_ANNDATA:
        assert "X_transcriptformer" not in data.obsm
        assert not result.isbacked
        np.testing.assert_array_equal(result.X.toarray(), random_adata(6).X.toarray())


def test_a_view_of_a_backed_anndata_requires_a_copy(
    model: Checkpoint, multiples: dict[int, np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    view = as_kind(layered(), "backed", tmp_path)[[4, 1]]
    result = tf.embed(view, model, copy=True)
    assert result is not None
    np.testing.assert_allclose(result.obsm["X_transcriptformer"], multiples[3][[4, 1]], rtol=1e-5, atol=1e-6)
    caplog.clear()
    with caplog.at_level(logging.INFO), pytest.raises(tf.TranscriptFormerError, match="use copy=True"):
        tf.embed(view, model)
    assert not caplog.text  # nothing was read


@with_all_kinds
@pytest.mark.parametrize(
    "settings",
    [
        {"model.inference_config.tokens_per_batch": 300},
        {"model.inference_config.oom_dataloader": False},
        {"model.data_config.block_size": 2},
        {"model.data_config.n_data_workers": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_how_cells_are_read_does_not_change_the_result(
    kind: str, settings: dict[str, object], multiples: dict[int, np.ndarray], tmp_path: Path
) -> None:
    model = tf.load(CHECKPOINT, device="cpu", precision="32", batch_size=3, settings=settings)
    for use_raw, factor in ((False, 1), (True, 3)):
        result = embedded(as_kind(layered(), kind, tmp_path / str(factor)), model, use_raw=use_raw)
        np.testing.assert_allclose(result.obsm["X_transcriptformer"], multiples[factor], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def with_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a label head."""
    folder = tmp_path_factory.mktemp("labels") / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    torch.manual_seed(0)
    torch.save(LabelHead("donor", ["a", "b"], 32).to_file(), folder / "label_head.pt")
    return folder


@with_all_kinds
def test_labels_llh_and_filters_can_be_combined(kind: str, with_labels: Path, tmp_path: Path) -> None:
    settings = {
        "model.inference_config.output_keys": ["llh"],
        "model.data_config.min_expressed_genes": 2,
        "model.inference_config.obs_keys": ["donor"],
    }
    model = tf.load(with_labels, device="cpu", precision="32", settings=settings)
    adata = make_adata([[1, 1], [1, 0], [2, 3]])
    adata.obs["donor"] = ["a", "b", "a"]
    result = embedded(as_kind(adata, kind, tmp_path), model)
    if kind in OF_ANNDATA:
        assert np.isnan(result.obsm["X_transcriptformer"]).all(axis=1).tolist() == [False, True, False]
        assert result.obs["predicted_donor"].isna().tolist() == [False, True, False]
        assert result.obs["predicted_donor_probability"].isna().tolist() == [False, True, False]
        assert result.obs["X_transcriptformer_llh"].isna().tolist() == [False, True, False]
        assert "X_transcriptformer" in result.uns
    else:
        assert list(result.obs_names) == ["c0", "c2"]
        assert list(result.obs.columns) == ["donor", "predicted_donor", "predicted_donor_probability"]
        assert result.uns["llh"]["llh"].notna().all()
        assert "transcriptformer" in result.uns


@with_all_kinds
@pytest.mark.parametrize("pool", ["gene", None, "donor"])
def test_gene_embeddings_need_no_labels(
    kind: str, pool: str | None, with_labels: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"model.inference_config.output_keys": ["embeddings", "llh"]}
    model = tf.load(with_labels, device="cpu", precision="32", settings=settings)
    result = tf.gene_embeddings(as_kind(layered(), kind, tmp_path), model, pool=pool)
    assert result.obsm["embeddings"].shape == (result.n_obs, 32)
    assert "gene_embeddings ignores the output key llh" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({}, {"emb_type": "cge"}, "emb_type has no effect in the Python API"),
        ({}, {"cge_pool": "donor"}, "cge_pool has no effect in the Python API"),
        ({}, {"output_filename": "x.h5ad"}, "output_filename has no effect in the Python API"),
        ({}, {"resume": True}, "resume has no effect in the Python API"),
        ({}, {"num_gpus": 2}, "num_gpus has no effect in the Python API"),
        ({"batch_size": 3}, {"batch_size": 4}, r"batch_size: conflicting values, argument 3 and settings 4"),
        ({"precision": "32"}, {"precision": "bf16-mixed"}, "precision: conflicting values"),
        ({}, {"no_such": 1}, "no_such: no such configuration key"),
    ],
)
def test_settings_without_effect_are_refused(
    arguments: dict[str, Any], settings: dict[str, object], message: str
) -> None:
    settings = {f"model.inference_config.{name}": value for name, value in settings.items()}
    with pytest.raises(tf.TranscriptFormerError, match=message):
        tf.load(CHECKPOINT, **{"device": "cpu", **arguments}, settings=settings)


def test_settings_may_repeat_defaults_and_arguments() -> None:
    settings = {"emb_type": "cell", "cge_pool": None, "device": "cpu", "batch_size": 3}
    settings = {f"model.inference_config.{name}": value for name, value in settings.items()}
    model = tf.load(CHECKPOINT, device="cpu", settings=settings)
    assert model.config.model.inference_config.batch_size == 3


@pytest.mark.parametrize("data", [3, None, [3], [None]])
def test_data_of_another_type_is_refused(data: Any, model: Checkpoint) -> None:
    for function in (tf.embed, tf.gene_embeddings):
        with pytest.raises(tf.TranscriptFormerError, match="must be an AnnData, a path or a list of paths"):
            function(data, model)


def test_results_outlive_their_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
    model = tf.load(folder, device="cpu")
    shutil.rmtree(folder)
    embedded = tf.embed(CELLS, model)
    assert embedded is not None
    assert embedded.uns["transcriptformer"]["weights_sha256"] == "unknown"
    assert "the provenance lacks the hash of the weights" in caplog.text
