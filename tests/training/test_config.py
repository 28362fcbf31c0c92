"""Layers and validation of the training configuration."""

import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.golden_cases import CHECKPOINT
from tests.training.training_runs import GENE_FILE
from transcriptformer.checkpoint.published import load_config
from transcriptformer.config import conf_dir
from transcriptformer.errors import CheckpointError, UsageError
from transcriptformer.training.config import TrainConfig, load_train_config

SCRATCH: dict[str, object] = {"training.data_files": ["x.h5ad"], "training.protein_embeddings": [str(GENE_FILE)]}
TUNED: dict[str, object] = {"training.data_files": ["x.h5ad"], "training.checkpoint_path": str(CHECKPOINT)}


def test_the_yaml_lists_every_setting_with_its_default() -> None:
    written = OmegaConf.load(conf_dir() / "train_config.yaml")
    fields = OmegaConf.structured(TrainConfig)
    assert set(written.training) == set(fields.training)
    for key, value in fields.training.items():
        assert written.training[key] == value, key


def test_vocabulary_files_and_metadata_columns_are_derived_from_scratch() -> None:
    config = load_train_config(SCRATCH)
    assert config.model.data_config.esm2_mappings == ["homo_sapiens_gene.h5"]
    assert config.model.data_config.aux_cols == ["assay"]
    assert config.model.model_config.aux_len == 1
    assert load_train_config(SCRATCH, ["model.data_config.aux_cols=[]"]).model.model_config.aux_len == 0


def test_a_checkpoint_sets_architecture_and_vocabularies_but_not_how_cells_are_read() -> None:
    config = load_train_config(TUNED)
    assert config.model.model_config.embed_dim == 32
    assert config.model.model_config.seq_len == 127
    assert config.model.data_config.esm2_mappings == ["homo_sapiens_gene.h5"]
    assert config.model.data_config.n_data_workers == 0
    assert config.model.data_config.randomize_genes


def edit_config(checkpoint: Path, section: str, **values: object) -> dict[str, object]:
    """Change values of a checkpoint, and return options to start from it."""
    path = checkpoint / "config.json"
    published = json.loads(path.read_text())
    published["model"][section] |= values
    path.write_text(json.dumps(published))
    return {**TUNED, "training.checkpoint_path": str(checkpoint)}


@pytest.mark.parametrize("nothing", [None, "", []])
def test_a_checkpoint_without_metadata_columns_has_none(nothing: object, checkpoint_copy: Path) -> None:
    edit_config(checkpoint_copy, "model_config", aux_len=0)
    config = load_train_config(edit_config(checkpoint_copy, "data_config", aux_cols=nothing))
    assert config.model.data_config.aux_cols == []


@pytest.mark.parametrize("name", ["gene_head_hidden_dim", "aux_len", "softcap", "log_counts_eps", "mu_link_fn"])
def test_values_that_a_checkpoint_leaves_unset_default_as_for_inference(name: str, checkpoint_copy: Path) -> None:
    """They do not default to those of a model from scratch."""
    options = edit_config(checkpoint_copy, "model_config", **{name: None})
    trained, embedded = (
        getattr(config.model.model_config, name)
        for config in (load_train_config(options), load_config(checkpoint_copy))
    )
    assert trained == embedded


def test_a_checkpoint_without_a_required_key_is_an_error(checkpoint_copy: Path) -> None:
    options = edit_config(checkpoint_copy, "model_config", num_layers=None)
    with pytest.raises(
        CheckpointError, match=r"config\.json: the required key 'model\.model_config\.num_layers' is missing"
    ):
        load_train_config(options)


def test_counts_are_preprocessed_as_for_the_checkpoint(checkpoint_copy: Path) -> None:
    as_trained = {"clip_counts": 12, "normalize_to_scale": 10_000, "sort_genes": True}
    options = edit_config(checkpoint_copy, "data_config", **as_trained, min_expressed_genes=200, gene_col_name="index")
    data = load_train_config(options).model.data_config
    assert {name: getattr(data, name) for name in as_trained} == as_trained
    assert not data.randomize_genes
    assert (data.min_expressed_genes, data.gene_col_name) == (0, "auto")  # depend on the cells, not on the model
    assert load_train_config(options, ["model.data_config.clip_counts=7"]).model.data_config.clip_counts == 7
    assert load_train_config(TUNED).model.data_config.clip_counts == 30  # unset in the checkpoint


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("aux_cols=[]", r"model\.data_config\.aux_cols: is \[\], but the checkpoint was trained with \['assay'\]"),
        (
            "special_tokens=[unknown]",
            r"special_tokens: is \['unknown'\], but the checkpoint was trained with \['unknown'",
        ),
        ("esm2_mappings=[x.h5]", r"esm2_mappings: is \['x\.h5'\], but the checkpoint was trained with \['homo_sap"),
        ("aux_pad_token=none", r"aux_pad_token: is none, but the checkpoint was trained with unknown; remove it"),
    ],
)
def test_vocabularies_of_a_checkpoint_cannot_be_replaced(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_train_config(TUNED, [f"model.data_config.{override}"])


def test_a_checkpoint_can_be_set_by_an_override() -> None:
    config = load_train_config({"training.data_files": ["x.h5ad"]}, [f"training.checkpoint_path={CHECKPOINT}"])
    assert config.model.model_config.embed_dim == 32


def test_a_recipe_overrides_the_yaml_but_not_options_and_overrides(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "training: {learning_rate: 0.5, max_epochs: 3, batch_size: 5}\nmodel: {model_config: {num_heads: 4}}"
    )
    options = {**SCRATCH, "training.max_epochs": 7}
    config = load_train_config(options, ["training.batch_size=9"], recipe)
    training = config.training
    assert (training.learning_rate, training.max_epochs, training.batch_size) == (0.5, 7, 9)
    assert config.model.model_config.num_heads == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {learning_rat: 1}", r"--config .*recipe\.yaml: .*learning_rat"),
        ("training: {learning_rate: fast}", r"--config .*recipe\.yaml: 'training\.learning_rate'.*fast"),
        ("training: [", r"--config .*recipe\.yaml: not valid YAML"),
        ("- training", r"--config .*recipe\.yaml: must have the sections of conf/train_config\.yaml"),
        ("training: 5", r"--config .*recipe\.yaml: must have the sections of conf/train_config\.yaml"),
    ],
)
def test_an_invalid_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_train_config(SCRATCH, [], recipe)


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ({}, [], r"training\.data_files \(--data-file\): no training files"),
        (
            {"training.data_files": ["x"]},
            [],
            r"--protein-embedding\): training requires protein embeddings, or a checkpoint",
        ),
        ({**SCRATCH, **TUNED}, [], r"is for training from scratch only; remove it, because --checkpoint-path includes"),
        ({**SCRATCH, "training.lora_rank": 4}, [], r"training\.lora_rank: requires --checkpoint-path"),
        ({**TUNED, "training.checkpoint_path": "nowhere"}, [], r"--checkpoint-path nowhere: no such folder"),
        (SCRATCH, ["training.learning_rate=0"], r"training\.learning_rate \(--learning-rate\): must be more than 0"),
        (SCRATCH, ["training.data_weights=[1,2]"], r"training\.data_weights: 2 weights for 1 data_files"),
        (SCRATCH, ["training.validation_fraction=1"], r"training\.validation_fraction: must be at least 0 and below 1"),
        (
            SCRATCH,
            ["training.validation_fraction=0", "training.patience=3"],
            r"--patience\): requires validation: set",
        ),
        (SCRATCH, ["training.learning_rat=1"], r"no such configuration key; did you mean training\.learning_rate\?"),
        (SCRATCH, ["training.betas=[0.9]"], r"training\.betas: must be two numbers in \[0, 1\)"),
        (
            SCRATCH,
            ["training.gene_loss_weight=0", "training.count_loss_weight=0"],
            r"training: all loss weights are 0",
        ),
        (
            {**TUNED, "training.label_column": "cell_type"},
            ["training.label_loss_weight=0"],
            r"training\.label_loss_weight: must be more than 0 with a label column",
        ),
        (TUNED, ["model.data_config.aux_cols=['a,b']"], r"'a,b' is empty, starts or ends with a blank, or contains"),
        (TUNED, ["training.checkpoint_path=null"], r"training requires protein embeddings, or a checkpoint"),
    ],
)
def test_invalid_settings_are_refused(options: dict[str, object], overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_train_config(options, overrides)
    assert re.search(message, str(caught.value)), caught.value


def test_a_damaged_checkpoint_is_an_error(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: the key 'model' is missing"):
        load_train_config({**TUNED, "training.checkpoint_path": str(checkpoint_copy)})


def test_the_recipe_of_the_demo_is_valid() -> None:
    config = load_train_config(SCRATCH, [], conf_dir() / "demo_train_config.yaml")
    assert config.model.data_config.gene_col_name == "index"
