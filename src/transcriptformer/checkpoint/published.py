"""Reading and writing `config.json` in the published format."""

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
"""Block size, in positions, of the published package's block-compiled attention."""

_CLASSES = {
    "data_config": "transcriptformer.data.dataclasses.DataConfig",
    "model_config": "transcriptformer.data.dataclasses.ModelConfig",
    "loss_config": "transcriptformer.data.dataclasses.LossConfig",
}
"""Class names in the published package's config.json."""

COUNT_SETTINGS = ("clip_counts", "normalize_to_scale", "sort_genes")
"""Preprocessing of counts, which is as in training unless an option says otherwise.

Filters, and where files hold genes and counts, do not carry over from a checkpoint.
"""

_NOT_PUBLISHED = ("remove_duplicate_genes", "seed", "block_size", "use_raw", "layer", "allow_external_links")
"""Settings for reading files that the published format does not have."""

_UNUSED_CHECKPOINT_KEYS = frozenset(
    {"_target_", "aux_vocab_path", "esm2_mappings_path", "pin_memory", "pad_zeros", "block_len"}
)
"""Keys of a published config.json that are ignored: class names, paths on the training machine and batch layout."""


def load_config(
    checkpoint_path: Path, options: Mapping[str, object] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Merge defaults, checkpoint, YAML, options and overrides, in this order, into one validated configuration.

    Parameters
    ----------
    checkpoint_path
        Checkpoint folder with the `config.json` of the trained model.
    options
        Dotted path → value; None values are ignored.
    overrides
        `dotted.path=value` in Hydra's grammar, applied last. Lists are set as a whole (`…output_keys=[embeddings,llh]`)
        or by index (`model.inference_config.obs_keys.0=cell_type`).

    Raises
    ------
    UsageError
        If an option or override has an unknown key, a wrong type or an invalid value.
    CheckpointError
        If `config.json` is missing or damaged, lacks a required key or has an invalid value.
    """
    if not checkpoint_path.is_dir():
        raise UsageError(f"--checkpoint-path {checkpoint_path}: no such folder")
    config_path = checkpoint_path / "config.json"
    defaults: Any = OmegaConf.load(conf_dir() / "inference_config.yaml")
    with config_json_errors(config_path):  # before options are merged, which would be blamed for its errors
        trained = read_checkpoint_config(checkpoint_path)
        config = OmegaConf.merge(OmegaConf.structured(Config), trained)
        OmegaConf.to_object(config)
    _keep_count_settings(defaults.model.data_config, trained["model"]["data_config"])
    config = OmegaConf.merge(config, defaults)
    assert isinstance(config, DictConfig)
    checked = finish_config(config, options or {}, overrides)
    assert isinstance(checked, Config)
    return checked


def _keep_count_settings(defaults: DictConfig, trained: Mapping[str, Any]) -> None:
    """Drop the defaults that would replace the preprocessing of counts in training."""
    changed = {key: trained[key] for key in COUNT_SETTINGS if trained.get(key, defaults[key]) != defaults[key]}
    if changed:
        logger.info("counts are prepared as in training: %s", ", ".join(f"{k}={v}" for k, v in changed.items()))
    for key in changed:
        del defaults[key]


def read_checkpoint_config(checkpoint_path: Path) -> dict[str, Any]:
    """Read the settings we use from a checkpoint's `config.json`, as a nested dict with the keys of `Config`.

    Handles the quirks of the published format: nulls mean "not set", `aux_cols` may be a comma-separated string,
    unknown keys are ignored with a warning.

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
            logger.warning("%s: ignoring unknown key model.%s.%s", path, section, key)
        used[section] = {key: value for key, value in values.items() if key in names and value is not None}
    for key in sections.keys() - known.keys() - {"_target_", "inference_config"}:
        logger.warning("%s: ignoring unknown key model.%s", path, key)

    aux_cols = used["data_config"].get("aux_cols")
    if isinstance(aux_cols, str):
        used["data_config"]["aux_cols"] = [column.strip() for column in aux_cols.split(",") if column.strip()]
    for key, value in leaves(used):
        if "${" in str(value):  # OmegaConf would interpolate environment variables
            raise CheckpointError(f"{path}: model.{key}: {value!s:.100} is an interpolation; write the value itself")
    return {"model": used}


@contextmanager
def config_json_errors(config_path: Path) -> Iterator[None]:
    """Translate errors in the values of a checkpoint's `config.json` to CheckpointError."""
    try:
        yield
    except MissingMandatoryValue as error:
        raise CheckpointError(f"{config_path}: the required key {full_key(error)} is missing") from error
    except OmegaConfBaseException as error:
        raise CheckpointError(f"{config_path}: {full_key(error)}: {first_line(error)}") from error
    except (UsageError, OverflowError) as error:
        raise CheckpointError(f"{config_path}: {first_line(error)}") from error


def published_config(model: TrainedModel) -> dict[str, Any]:
    """Return the sections of `config.json` with the keys of the published format.

    The scaling, clipping and sorting of counts is kept; filters and gene shuffling apply to training only.
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
