"""How the configuration of training is layered, and what it refuses."""

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


def test_the_yaml_names_every_setting_with_the_default_of_its_field() -> None:
    written = OmegaConf.load(conf_dir() / "train_config.yaml")
    fields = OmegaConf.structured(TrainConfig)
    assert set(written.training) == set(fields.training)
    for key, value in fields.training.items():
        assert written.training[key] == value, key


def test_from_scratch_vocabulary_files_and_metadata_columns_follow_from_what_is_given() -> None:
    config = load_train_config(SCRATCH)
    assert config.model.data_config.esm2_mappings == ["homo_sapiens_gene.h5"]
    assert config.model.data_config.aux_cols == ["assay"]
    assert config.model.model_config.aux_len == 1
    assert load_train_config(SCRATCH, ["model.data_config.aux_cols=[]"]).model.model_config.aux_len == 0


def test_a_checkpoint_brings_its_architecture_and_vocabularies_but_not_how_its_cells_were_read() -> None:
    config = load_train_config(TUNED)
    assert config.model.model_config.embed_dim == 32
    assert config.model.model_config.seq_len == 127
    assert config.model.data_config.esm2_mappings == ["homo_sapiens_gene.h5"]
    assert config.model.data_config.n_data_workers == 0
    assert config.model.data_config.randomize_genes


def edit_config(checkpoint: Path, section: str, **values: object) -> dict[str, object]:
    """Options to train on from a checkpoint of which these values are changed."""
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
def test_what_a_checkpoint_leaves_out_is_what_inference_takes_it_for(name: str, checkpoint_copy: Path) -> None:
    """Not what a model from scratch has."""
    options = edit_config(checkpoint_copy, "model_config", **{name: None})
    trained, embedded = (
        getattr(config.model.model_config, name)
        for config in (load_train_config(options), load_config(checkpoint_copy))
    )
    assert trained == embedded


def test_a_checkpoint_that_leaves_out_a_needed_key_is_named(checkpoint_copy: Path) -> None:
    options = edit_config(checkpoint_copy, "model_config", num_layers=None)
    with pytest.raises(
        CheckpointError, match=r"config\.json: the needed key 'model\.model_config\.num_layers' is missing"
    ):
        load_train_config(options)


def test_counts_are_treated_as_the_checkpoint_says(checkpoint_copy: Path) -> None:
    as_trained = {"clip_counts": 12, "normalize_to_scale": 10_000, "sort_genes": True}
    options = edit_config(checkpoint_copy, "data_config", **as_trained, min_expressed_genes=200, gene_col_name="index")
    data = load_train_config(options).model.data_config
    assert {name: getattr(data, name) for name in as_trained} == as_trained
    assert not data.randomize_genes
    assert (data.min_expressed_genes, data.gene_col_name) == (0, "ensembl_id")  # of these cells, not of the model
    assert load_train_config(options, ["model.data_config.clip_counts=7"]).model.data_config.clip_counts == 7
    assert load_train_config(TUNED).model.data_config.clip_counts == 30  # where it says nothing


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("aux_cols=[]", r"model\.data_config\.aux_cols: is \[\], but the checkpoint was trained with \['assay'\]"),
        (
            "special_tokens=[unknown]",
            r"special_tokens: is \['unknown'\], but the checkpoint was trained with \['unknown'",
        ),
        ("esm2_mappings=[x.h5]", r"esm2_mappings: is \['x\.h5'\], but the checkpoint was trained with \['homo_sap"),
        ("aux_pad_token=none", r"aux_pad_token: is none, but the checkpoint was trained with unknown; leave it out"),
    ],
)
def test_vocabularies_of_a_checkpoint_cannot_be_replaced(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_train_config(TUNED, [f"model.data_config.{override}"])


def test_a_checkpoint_may_be_named_by_an_override_too() -> None:
    config = load_train_config({"training.data_files": ["x.h5ad"]}, [f"training.checkpoint_path={CHECKPOINT}"])
    assert config.model.model_config.embed_dim == 32


def test_a_recipe_wins_over_the_yaml_and_loses_to_options_and_overrides(tmp_path: Path) -> None:
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
        ("training: [", r"--config .*recipe\.yaml: not readable as YAML"),
        ("- training", r"--config .*recipe\.yaml: not of the form of conf/train_config\.yaml"),
        ("training: 5", r"--config .*recipe\.yaml: not of the form of conf/train_config\.yaml"),
    ],
)
def test_a_recipe_with_a_fault_is_refused(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_train_config(SCRATCH, [], recipe)


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ({}, [], r"training\.data_files \(--data-file\): there is no file to learn from"),
        ({"training.data_files": ["x"]}, [], r"--protein-embedding\): there is nothing to start from"),
        ({**SCRATCH, **TUNED}, [], r"is for training from scratch; a checkpoint \(--checkpoint-path\) brings its own"),
        ({**SCRATCH, "training.lora_rank": 4}, [], r"training\.lora_rank: .*needs --checkpoint-path"),
        ({**TUNED, "training.checkpoint_path": "nowhere"}, [], r"--checkpoint-path nowhere: no such folder"),
        (SCRATCH, ["training.learning_rate=0"], r"training\.learning_rate \(--learning-rate\): must be more than 0"),
        (SCRATCH, ["training.data_weights=[1,2]"], r"training\.data_weights: 2 weights for 1 data_files"),
        (SCRATCH, ["training.validation_fraction=1"], r"training\.validation_fraction: must be from 0 to less than 1"),
        (
            SCRATCH,
            ["training.validation_fraction=0", "training.patience=3"],
            r"--patience\): needs cells to validate on",
        ),
        (SCRATCH, ["training.learning_rat=1"], r"no such configuration key; did you mean training\.learning_rate\?"),
        (SCRATCH, ["training.betas=[0.9]"], r"training\.betas: must be two, below 1"),
        (
            SCRATCH,
            ["training.gene_loss_weight=0", "training.count_loss_weight=0"],
            r"training: all weights of losses are 0",
        ),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_train_config(options, overrides)
    assert re.search(message, str(caught.value)), caught.value


def test_a_damaged_checkpoint_is_named(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: the key 'model' is missing"):
        load_train_config({**TUNED, "training.checkpoint_path": str(checkpoint_copy)})


def test_the_recipe_of_the_demo_is_a_valid_one() -> None:
    config = load_train_config(SCRATCH, [], conf_dir() / "demo_train_config.yaml")
    assert config.model.data_config.gene_col_name == "index"
