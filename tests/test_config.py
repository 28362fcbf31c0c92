import json
from pathlib import Path

import pytest

from tests.golden_cases import CHECKPOINT
from transcriptformer.checkpoint.published import load_config
from transcriptformer.errors import UsageError


def edit_config_json(checkpoint: Path, section: str, **values: object) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["model"][section].update(values)
    path.write_text(json.dumps(config))


def test_defaults_match_the_published_package() -> None:
    model = load_config(CHECKPOINT).model
    assert model.data_config.gene_col_name == "auto"  # finds ensembl_id, the published default, if there is one
    assert model.data_config.clip_counts == 30
    assert model.data_config.filter_to_vocabs is True
    assert model.data_config.use_raw is None
    assert model.data_config.n_data_workers == 0
    assert model.inference_config.precision == "16-mixed"
    assert model.inference_config.output_path == "./inference_results"
    assert model.inference_config.output_filename == "embeddings.h5ad"
    assert model.inference_config.embedding_layer_index == -1
    assert model.inference_config.emb_type == "cell"
    assert model.model_type == "transcriptformer"


def test_the_default_batch_size_is_auto() -> None:
    assert load_config(CHECKPOINT).model.inference_config.batch_size == "auto"


def test_the_architecture_comes_from_the_checkpoint() -> None:
    model = load_config(CHECKPOINT).model
    assert (model.model_config.num_layers, model.model_config.seq_len) == (2, 127)
    assert model.data_config.aux_cols == ["assay"]
    assert model.data_config.esm2_mappings == ["homo_sapiens_gene.h5"]


def test_later_sources_override_earlier_ones(checkpoint_copy: Path) -> None:
    edit_config_json(checkpoint_copy, "data_config", clip_counts=7, special_tokens=["unknown", "[PAD]"])
    key = "model.data_config.clip_counts"
    assert load_config(checkpoint_copy).model.data_config.special_tokens == ["unknown", "[PAD]"]
    assert load_config(checkpoint_copy).model.data_config.clip_counts == 7
    assert load_config(checkpoint_copy, {key: None}).model.data_config.clip_counts == 7
    assert load_config(checkpoint_copy, {key: 20}).model.data_config.clip_counts == 20
    assert load_config(checkpoint_copy, {key: 20}, [f"{key}=10", f"{key}=5"]).model.data_config.clip_counts == 5


def test_counts_are_prepared_as_in_training(checkpoint_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    as_trained = {"clip_counts": 100.0, "normalize_to_scale": 1e4, "sort_genes": True}
    edit_config_json(checkpoint_copy, "data_config", **as_trained, filter_outliers=3, gene_col_name="x")
    with caplog.at_level("INFO"):
        data = load_config(checkpoint_copy).model.data_config
    assert {name: getattr(data, name) for name in as_trained} == as_trained
    assert (data.filter_outliers, data.gene_col_name) == (0, "auto")
    assert "counts are prepared as in training: clip_counts=100.0, normalize_to_scale=10000.0" in caplog.text


@pytest.mark.parametrize(
    ("published", "expected"),
    [("assay", ["assay"]), ("assay, tissue", ["assay", "tissue"]), (["assay"], ["assay"]), (None, []), ("", [])],
)
def test_aux_cols_may_be_a_string_a_list_or_null(checkpoint_copy: Path, published: object, expected: list[str]) -> None:
    edit_config_json(checkpoint_copy, "data_config", aux_cols=published)
    assert load_config(checkpoint_copy).model.data_config.aux_cols == expected


def test_unknown_keys_of_a_checkpoint_are_ignored_with_a_warning(
    checkpoint_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config_json(checkpoint_copy, "model_config", flux_capacitor=3)
    load_config(checkpoint_copy)
    assert "ignoring unknown key model.model_config.flux_capacitor" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["obs_keys.0=cell_type"], ["cell_type"]),
        (["obs_keys.0=cell_type", "obs_keys.1=donor"], ["cell_type", "donor"]),
        (["obs_keys=[cell_type,donor]"], ["cell_type", "donor"]),
        (["obs_keys=['cell type']"], ["cell type"]),
        (["obs_keys=[]"], []),
    ],
)
def test_overrides_replace_lists_and_their_items(overrides: list[str], expected: list[str]) -> None:
    overrides = [f"model.inference_config.{override}" for override in overrides]
    assert load_config(CHECKPOINT, {}, overrides).model.inference_config.obs_keys == expected


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("false", False), ("null", None), ("auto", "auto"), ("True", True)]
)
def test_use_raw_accepts_the_published_values(text: str, value: bool | str | None) -> None:
    assert load_config(CHECKPOINT, {}, [f"model.data_config.use_raw={text}"]).model.data_config.use_raw == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.data_config.clip_count=3", "clip_count: no such .* did you mean model.data_config.clip_counts"),
        ("clip_counts=3", "clip_counts: no such .* did you mean model.data_config.clip_counts"),
        ("model.inference_config.batch_size=many", "batch_size.*: must be at least 1, or auto, not many"),
        ("model.inference_config.batch_size.x=1", "batch_size.x: "),
        ("model.inference_config.batch_size=0", r"batch_size \(--batch-size\): must be at least 1, or auto, not 0"),
        ("model.inference_config.obs_keys.7=a", "obs_keys.7: list index out of range"),
        ("model.inference_config.obs_keys=cell_type", "obs_keys: Invalid value"),
        ("model.inference_config.obs_keys=[a,[b]]", "obs_keys: must be a list of column names"),
        ("model.inference_config.output_path='${nowhere}'", "output_path': Interpolation key 'nowhere' not found"),
        ("model.inference_config.output_keys=[umap]", "output_keys: 'umap' is not one of embeddings, llh"),
        ("model.inference_config.output_keys=[]", "output_keys: must name at least one"),
        ("model.inference_config.precision=64", "precision .*'64' is not one of 16-mixed, bf16-mixed, 32"),
        ("model.inference_config.embedding_layer_index=2", "2 layers, 2 is outside -2…1"),
        ("model.inference_config.output_filename=a/b.h5ad", "not a name that ends in .h5ad or .zarr"),
        ("model.data_config.use_raw=maybe", "use_raw .*'maybe' is not one of True, False, None, auto"),
        ("model.data_config.clip_counts=0", "clip_counts .*must be more than 0"),
        ("model.data_config.clip_counts@elsewhere=3", "give one plain key.path=value"),
        ("model.inference_config.obs_keys.x=1", "obs_keys.x: "),
        ("model.data_config.seed=-1", "seed: must be from 0 to 9,223,372,036,854,775,807, not -1"),
        ("model.data_config.gene_col_name=???", "gene_col_name'"),
        ("model.data_config.clip_counts", "is not of the form key.path=value"),
        ("model.inference_config.obs_keys=a,b", r"a list as \[a,b\]"),
        ("+model.data_config.new=1", "give one plain key.path=value"),
        ("~model.data_config.clip_counts", "give one plain key.path=value"),
    ],
)
def test_an_invalid_override_is_an_error_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(CHECKPOINT, {}, [override])


def test_the_resolved_configuration_can_be_read_back() -> None:
    config = json.loads(load_config(CHECKPOINT, {"model.data_config.clip_counts": 4}).to_json())
    assert config["model"]["data_config"]["clip_counts"] == 4
    assert config["model"]["model_config"]["embed_dim"] == 32
