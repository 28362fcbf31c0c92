"""The options of every command: their names, help and defaults."""

import re

import pytest
import typer
from omegaconf import OmegaConf
from typer.testing import CliRunner

from tests.golden_cases import CHECKPOINT
from transcriptformer.checkpoint.published import load_config
from transcriptformer.cli.main import app
from transcriptformer.config import conf_dir
from transcriptformer.training.config import TrainingConfig

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

NAMES = {
    "check": [
        "--allow-external-links",
        "--batch-size",
        "--checkpoint-path",
        "--config-override",
        "--debug",
        "--device",
        "--duplicate-genes",
        "--gene-col-name",
        "--gene-map",
        "--json",
        "--layer",
        "--modality",
        "--precision",
        "--pretrained-embedding",
        "--recover-counts",
        "--remove-duplicate-genes",
        "--use-raw",
        "files",
    ],
    "demo": ["--debug", "--output-path"],
    "download": ["--bucket", "--checkpoint-dir", "--connections", "--debug", "--force", "--max-retries", "models"],
    "download-data": [
        "--assay",
        "--cells-per-file",
        "--census-uri",
        "--census-version",
        "--collection",
        "--debug",
        "--disease",
        "--dry-run",
        "--filter",
        "--max-datasets",
        "--max-retries",
        "--no-metadata",
        "--output-dir",
        "--processes",
        "--source",
        "--species",
        "--test-only",
        "--tissue",
    ],
    "embed-proteins": [
        "--compare",
        "--debug",
        "--device",
        "--fasta",
        "--id-from",
        "--isoforms",
        "--layer",
        "--max-length",
        "--max-retries",
        "--model",
        "--num-gpus",
        "--organism-key",
        "--output-dir",
        "--precision",
        "--resume",
        "--tokens-per-batch",
    ],
    "generate": [
        "--assay",
        "--batch-size",
        "--candidates",
        "--checkpoint-path",
        "--config-override",
        "--count-rounds",
        "--data-file",
        "--debug",
        "--device",
        "--gene",
        "--gene-map",
        "--impute",
        "--keep",
        "--like",
        "--n-cells",
        "--n-genes",
        "--output-filename",
        "--output-path",
        "--plot",
        "--precision",
        "--seed",
        "--temperature",
        "--top-p",
        "--total-counts",
    ],
    "inference": [
        "--allow-external-links",
        "--batch-size",
        "--cge-pool",
        "--checkpoint-path",
        "--clip-counts",
        "--config-override",
        "--data-file",
        "--debug",
        "--device",
        "--duplicate-genes",
        "--emb-type",
        "--embedding-layer-index",
        "--filter-to-vocabs",
        "--gene-col-name",
        "--gene-map",
        "--layer",
        "--make-names-unique",
        "--modality",
        "--model-type",
        "--n-data-workers",
        "--no-filter-to-vocabs",
        "--no-oom-dataloader",
        "--num-gpus",
        "--num-nodes",
        "--oom-dataloader",
        "--output-filename",
        "--output-path",
        "--precision",
        "--pretrained-embedding",
        "--recover-counts",
        "--remove-duplicate-genes",
        "--resume",
        "--use-raw",
        "more_files",
    ],
    "perturb": [
        "--allow-external-links",
        "--at",
        "--batch-size",
        "--checkpoint-path",
        "--config-override",
        "--debug",
        "--device",
        "--duplicate-genes",
        "--gene-col-name",
        "--gene-map",
        "--groupby",
        "--knock-out",
        "--knock-out-each",
        "--layer",
        "--make-names-unique",
        "--modality",
        "--n-data-workers",
        "--null",
        "--num-gpus",
        "--num-nodes",
        "--output-filename",
        "--output-path",
        "--plot",
        "--precision",
        "--pretrained-embedding",
        "--recover-counts",
        "--remove-duplicate-genes",
        "--resume",
        "--seed",
        "--set",
        "--use-raw",
        "files",
    ],
    "score": [
        "--allow-external-links",
        "--batch-size",
        "--checkpoint-path",
        "--config-override",
        "--debug",
        "--device",
        "--duplicate-genes",
        "--gene-col-name",
        "--gene-map",
        "--layer",
        "--make-names-unique",
        "--modality",
        "--n-data-workers",
        "--num-gpus",
        "--num-nodes",
        "--orders",
        "--output-filename",
        "--output-path",
        "--per-gene",
        "--precision",
        "--recover-counts",
        "--remove-duplicate-genes",
        "--resume",
        "--seed",
        "--use-raw",
        "files",
    ],
    "prompt": [
        "--assay",
        "--batch-size",
        "--candidates",
        "--cells-per-group",
        "--checkpoint-path",
        "--config-override",
        "--data-file",
        "--debug",
        "--device",
        "--gene",
        "--gene-map",
        "--groupby",
        "--null",
        "--output-path",
        "--plot",
        "--precision",
        "--prompts",
        "--seed",
        "--sources",
        "--targets",
        "--top",
    ],
    "train": [
        "--allow-external-links",
        "--batch-size",
        "--checkpoint-path",
        "--config",
        "--config-override",
        "--data-file",
        "--debug",
        "--device",
        "--duplicate-genes",
        "--freeze",
        "--gene-col-name",
        "--gene-map",
        "--label-column",
        "--layer",
        "--learning-rate",
        "--lora-rank",
        "--max-epochs",
        "--max-steps",
        "--modality",
        "--n-data-workers",
        "--new-assay",
        "--num-gpus",
        "--num-nodes",
        "--output-path",
        "--patience",
        "--precision",
        "--protein-embedding",
        "--recover-counts",
        "--remove-duplicate-genes",
        "--resume",
        "--seed",
        "--use-raw",
        "--validation-file",
        "--validation-fraction",
    ],
}
"""Parameters of each command, which people have in their scripts."""

INFERENCE = {
    "--output-path": "model.inference_config.output_path",
    "--output-filename": "model.inference_config.output_filename",
    "--batch-size": "model.inference_config.batch_size",
    "--gene-col-name": "model.data_config.gene_col_name",
    "--precision": "model.inference_config.precision",
    "--clip-counts": "model.data_config.clip_counts",
    "--use-raw": "model.data_config.use_raw",
    "--embedding-layer-index": "model.inference_config.embedding_layer_index",
    "--model-type": "model.model_type",
    "--emb-type": "model.inference_config.emb_type",
    "--device": "model.inference_config.device",
    "--num-gpus": "model.inference_config.num_gpus",
    "--num-nodes": "model.inference_config.num_nodes",
    "--n-data-workers": "model.data_config.n_data_workers",
}
TRAIN = {
    "--gene-col-name": "model.data_config.gene_col_name",
    "--use-raw": "model.data_config.use_raw",
    "--n-data-workers": "model.data_config.n_data_workers",
    **{
        f"--{name.replace('_', '-')}": f"training.{name}"
        for name in (
            *("validation_fraction", "output_path", "max_epochs", "batch_size", "learning_rate", "precision", "device"),
            *("num_gpus", "num_nodes", "seed"),
        )
    },
}


def test_commands_and_options_keep_their_names() -> None:
    found = {
        name: sorted(option for p in command.params for option in (*p.opts, *p.secondary_opts))
        for name, command in COMMANDS.items()
    }
    assert found == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_help_of_an_option_is_a_short_line(name: str) -> None:
    for parameter in COMMANDS[name].params:
        text = (getattr(parameter, "help", None) or "").partition("  [default")[0]
        assert text.endswith("."), parameter.name
        assert len(text.split()) <= 12, text


@pytest.mark.parametrize("name", NAMES)
def test_no_default_is_in_parentheses(name: str) -> None:
    assert "[default: (" not in " ".join(help_of(name).split())


def test_inference_shows_the_defaults_of_its_configuration() -> None:
    config = OmegaConf.structured(load_config(CHECKPOINT))
    assert_shown("inference", {option: OmegaConf.select(config, key) for option, key in INFERENCE.items()})


def test_check_shows_those_of_inference() -> None:
    config = OmegaConf.structured(load_config(CHECKPOINT))
    keys = {option: key for option, key in INFERENCE.items() if option in NAMES["check"]}
    assert len(keys) == 5
    assert_shown("check", {option: OmegaConf.select(config, key) for option, key in keys.items()})


def test_train_shows_the_defaults_of_its_configuration() -> None:
    config = OmegaConf.merge(
        {"training": OmegaConf.structured(TrainingConfig)}, OmegaConf.load(conf_dir() / "train_config.yaml")
    )
    assert_shown("train", {option: OmegaConf.select(config, key) for option, key in TRAIN.items()})


def assert_shown(command: str, defaults: dict[str, object]) -> None:
    shown = dict(
        re.findall(r"(?:^| )(--[a-z-]+)(?:(?! --).)*?\[default: ([^\]]+)\]", " ".join(help_of(command).split()))
    )
    for option, value in defaults.items():
        assert as_value(shown[option]) == as_value("auto" if value is None else str(value)), option


def as_value(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def help_of(command: str) -> str:
    return CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
