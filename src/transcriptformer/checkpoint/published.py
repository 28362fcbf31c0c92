"""The published format of `config.json`: what is read from it, and what a trained model writes into it."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from transcriptformer.checkpoint.files import read_json
from transcriptformer.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    TrainedModel,
    conf_dir,
    finish_config,
    first_line,
    full_key,
    leaves,
)
from transcriptformer.errors import CheckpointError, UsageError

logger = logging.getLogger(__name__)

BLOCK_LEN = 128
"""Positions of a block in the published package's attention, which is compiled for whole blocks."""

_CLASSES = {
    "data_config": "transcriptformer.data.dataclasses.DataConfig",
    "model_config": "transcriptformer.data.dataclasses.ModelConfig",
    "loss_config": "transcriptformer.data.dataclasses.LossConfig",
}
"""Names that the published package's config.json bears."""

_NOT_PUBLISHED = ("remove_duplicate_genes", "seed", "block_size", "use_raw", "allow_external_links")
"""Settings of ours about how files are read, which the published format does not have."""


# Keys of a published config.json that say nothing we need: class names, paths of the machine it was trained on,
# and how the reference lays out its batches.
_UNUSED_CHECKPOINT_KEYS = frozenset(
    {"_target_", "aux_vocab_path", "esm2_mappings_path", "pin_memory", "pad_zeros", "block_len"}
)


def load_config(
    checkpoint_path: Path, options: Mapping[str, object] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Layer defaults, checkpoint, YAML, options and overrides into one checked configuration.

    Parameters
    ----------
    checkpoint_path
        Folder whose `config.json` says what was trained.
    options
        Dotted path → value; None means "not given".
    overrides
        `dotted.path=value` in Hydra's grammar, applied last; a list takes an index as a key
        (`model.inference_config.obs_keys.0=cell_type`) or a whole list (`…output_keys=[embeddings,llh]`).

    Raises
    ------
    UsageError
        If an option or override has an unknown key, a wrong type or an impossible value.
    CheckpointError
        If `config.json` is missing, damaged, lacks a needed key or has an impossible value.
    """
    if not checkpoint_path.is_dir():
        raise UsageError(f"--checkpoint-path {checkpoint_path}: no such folder")
    config_path = checkpoint_path / "config.json"
    with faults_of(config_path):  # looked for before options come in, so that they are not blamed on these
        config = OmegaConf.merge(OmegaConf.structured(Config), read_checkpoint_config(checkpoint_path))
        OmegaConf.to_object(config)
    config = OmegaConf.merge(config, OmegaConf.load(conf_dir() / "inference_config.yaml"))
    assert isinstance(config, DictConfig)
    checked = finish_config(config, options or {}, overrides)
    assert isinstance(checked, Config)
    return checked


def read_checkpoint_config(checkpoint_path: Path) -> dict[str, Any]:
    """Read the parts of a checkpoint's `config.json` that we use, as a nested dict that fits `Config`.

    This is the one place that knows the published format: nulls mean "not set here", `aux_cols` may be a
    comma-separated string, unknown keys are reported and left out.

    Raises
    ------
    CheckpointError
        If the file is missing, is not JSON, or has no `model` section.
    """
    path = checkpoint_path / "config.json"
    try:
        published = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; is {checkpoint_path} a checkpoint folder?") from None
    sections = published.get("model") if isinstance(published, dict) else None
    if not isinstance(sections, dict):
        raise CheckpointError(f"{path}: the key 'model' is missing")

    known = {"model_config": ModelConfig, "data_config": DataConfig, "loss_config": LossConfig}
    used: dict[str, Any] = {}
    for section, schema in known.items():
        values = sections.get(section)
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: the key 'model.{section}' is missing")
        names = {f.name for f in fields(schema)}
        for key in values.keys() - names - _UNUSED_CHECKPOINT_KEYS:
            logger.warning("%s: unknown key model.%s.%s is left out", path, section, key)
        used[section] = {key: value for key, value in values.items() if key in names and value is not None}
    for key in sections.keys() - known.keys() - {"_target_", "inference_config"}:
        logger.warning("%s: unknown key model.%s is left out", path, key)

    aux_cols = used["data_config"].get("aux_cols")
    if isinstance(aux_cols, str):
        used["data_config"]["aux_cols"] = [column.strip() for column in aux_cols.split(",") if column.strip()]
    for key, value in leaves(used):
        if "${" in str(value):  # OmegaConf would put a variable of the environment there
            raise CheckpointError(f"{path}: model.{key}: {value!s:.100} refers to another value; give it itself")
    return {"model": used}


@contextmanager
def faults_of(config_path: Path) -> Iterator[None]:
    """Raise what is wrong with the values of a checkpoint's `config.json` as CheckpointError."""
    try:
        yield
    except MissingMandatoryValue as error:
        raise CheckpointError(f"{config_path}: the needed key {full_key(error)} is missing") from error
    except OmegaConfBaseException as error:
        raise CheckpointError(f"{config_path}: {full_key(error)}: {first_line(error)}") from error
    except (UsageError, OverflowError) as error:
        raise CheckpointError(f"{config_path}: {first_line(error)}") from error


def published_config(model: TrainedModel) -> dict[str, Any]:
    """The sections of `config.json`, with the keys of the published format.

    How counts were scaled, clipped and sorted is said; filters and the shuffling of genes are of the training alone.
    """
    sections = asdict(model)
    data = {key: value for key, value in sections["data_config"].items() if key not in _NOT_PUBLISHED}
    data |= dict.fromkeys(("filter_to_vocabs", "filter_outliers", "min_expressed_genes", "randomize_genes"))
    data |= {"n_data_workers": 1, "pin_memory": True, "pad_zeros": True}
    data |= {"aux_vocab_path": None, "esm2_mappings_path": None, "aux_cols": ",".join(data["aux_cols"]) or None}
    sections["data_config"] = data
    sections["model_config"] |= {"block_len": BLOCK_LEN}
    named = {name: {"_target_": _CLASSES[name], **values} for name, values in sections.items()}
    return {"_target_": "transcriptformer.model.model.Transcriptformer", **named}
