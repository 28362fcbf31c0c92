"""Configuration of `transcriptformer train`: `model`, which is saved in the checkpoint's config.json, and `training`.

Later layers override earlier ones: the defaults below, `conf/train_config.yaml`, a recipe (`--config`), options,
overrides. A checkpoint to start from replaces the architecture, losses, vocabularies and preprocessing of counts in the
YAML file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from transcriptformer.checkpoint.published import COUNT_SETTINGS, config_json_errors, read_checkpoint_config
from transcriptformer.config import (
    MAX_INT,
    ComputeConfig,
    TrainedModel,
    conf_dir,
    finish_config,
    parse_override,
    require,
    require_one_of,
    require_positive,
    require_ranges,
)
from transcriptformer.errors import UsageError, one_line

MEAN = "mean"
"""Starts a new value of a metadata column from the mean of the known values."""

MAX_WEIGHT = 1e6
"""Maximum weight of a loss or a file."""

_RANGES = {
    "max_epochs (--max-epochs)": (1, 10**6),
    "max_steps (--max-steps)": (1, MAX_INT),
    "patience (--patience)": (1, MAX_INT),
    "batch_size (--batch-size)": (1, MAX_INT),
    "tokens_per_batch": (1, MAX_INT),
    "final_learning_rate_share": (0, 1),
    "warmup_share": (0, 1),
    "weight_decay": (0, 1e3),
    "clip_gradients": (0, 1e30),
    "gene_loss_weight": (0, MAX_WEIGHT),
    "count_loss_weight": (0, MAX_WEIGHT),
    "label_loss_weight": (0, MAX_WEIGHT),
    "lora_rank (--lora-rank)": (0, 2**16),
    "lora_alpha": (0, 1e6),
    "seed (--seed)": (0, 2**63 - 1),
    "streams": (1, 2**16),
    "block_size": (1, 2**24),
    "blocks_to_mix": (1, 2**16),
    "validate_every": (1, MAX_INT),
    "save_every": (1, MAX_INT),
    "log_every": (1, MAX_INT),
}


@dataclass
class TrainingConfig(ComputeConfig):
    """Settings of `transcriptformer train` (`training`)."""

    data_files: list[str] = field(default_factory=list)
    """h5ad files or zarr stores with raw counts; names may contain the wildcards * and **."""
    data_weights: list[float] = field(default_factory=list)
    """Passes over each of `data_files` per epoch, possibly fractional; empty: one over every file."""
    validation_files: list[str] = field(default_factory=list)
    """Files of held-out cells for validation."""
    validation_fraction: float = 0.1
    """Share of the cells of `data_files` held out for validation if there are no `validation_files`; 0: none."""
    checkpoint_path: str | None = None
    """Folder of the checkpoint to start from; None: train from scratch."""
    protein_embeddings: list[str] = field(default_factory=list)
    """Protein-embedding files, whose genes are the vocabulary of a model from scratch."""
    new_aux_values: dict[str, dict[str, str]] = field(default_factory=dict)
    """Values to append to the vocabulary of a metadata column, and the known value each starts from, or `mean`."""
    label_column: str | None = None
    """`obs` column with labels, such as cell types, that a head learns to predict from the cell embedding."""
    freeze: list[str] | None = None
    """Modules to freeze, such as transformer_encoder.encoder_layers.0; None: none (LoRA: all pretrained ones)."""
    lora_rank: int = 0
    """Rank of the LoRA updates of attention and feed-forward weights; 0: no LoRA."""
    lora_alpha: float = 16.0
    """LoRA updates are scaled by lora_alpha / lora_rank."""
    output_path: str = "./training_results"
    """Output folder."""
    max_epochs: int = 10
    """Maximum passes over the training cells."""
    max_steps: int | None = None
    """Maximum optimizer steps; None: no limit besides `max_epochs`."""
    patience: int | None = None
    """Stop after this many consecutive validations without improvement; None: no early stopping."""
    batch_size: int = 64
    """Cells per optimizer step, over all processes."""
    tokens_per_batch: int | None = None
    """Maximum positions per batch; gradients of larger steps are accumulated. None: depends on the device."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    final_learning_rate_share: float = 0.1
    """Final learning rate after cosine decay, as a share of the peak."""
    warmup_share: float = 0.05
    """Share of the steps used for linear warm-up."""
    weight_decay: float = 0.1
    """AdamW weight decay; not applied to norms, biases and embeddings."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW betas."""
    clip_gradients: float = 1.0
    """Maximum gradient norm; 0: no clipping."""
    gene_loss_weight: float | None = None
    """Weight of the gene cross-entropy; None: model.loss_config.gene_id_loss_weight (where 0 means no gene head)."""
    count_loss_weight: float = 1.0
    """Weight of the negative log-likelihood of the counts."""
    label_loss_weight: float = 1.0
    """Weight of the label cross-entropy."""
    start_from_frequencies: bool = True
    """Initialize the heads of a model from scratch with gene frequencies and mean counts."""
    attention: str = "auto"
    """blockwise: long cells in blocks; flex: compiled, on a GPU; plain; or auto: flex on a GPU, blockwise elsewhere."""
    seed: int = 0
    """Seed of weights, order, dropout and the choice of validation cells."""
    streams: int = 8
    """Contiguous parts of the shuffled cells that are read in parallel. The order does not depend on processes and
    workers unless there are more of them than streams."""
    block_size: int = 128
    """Consecutive cells read together."""
    blocks_to_mix: int = 16
    """Blocks per stream that are held in memory and shuffled together."""
    validate_every: int | None = None
    """Steps between validations; None: once per epoch."""
    save_every: int = 500
    """Steps between saves of the training state."""
    log_every: int = 10
    """Steps between lines in metrics.csv."""

    def __post_init__(self) -> None:
        key = "training."
        require(
            not self.data_weights or len(self.data_weights) == len(self.data_files),
            key + "data_weights",
            f"{len(self.data_weights)} weights for {len(self.data_files)} data_files",
        )
        is_weight = all(0 < weight <= MAX_WEIGHT for weight in self.data_weights)
        require(is_weight, key + "data_weights", f"must be above 0 and at most {MAX_WEIGHT:g}")
        require(0 <= self.validation_fraction < 1, key + "validation_fraction", "must be at least 0 and below 1")
        require_ranges(self, key, _RANGES)
        require_positive(self, key, {"learning_rate (--learning-rate)": 1e30})
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), key + "betas", "must be two numbers in [0, 1)"
        )
        self.require_computable(key)
        require_one_of(self.attention, ("auto", "blockwise", "flex", "plain"), key + "attention")
        require(
            self.checkpoint_path is None or not self.protein_embeddings,
            key + "protein_embeddings (--protein-embedding)",
            "is for training from scratch only; remove it, because --checkpoint-path includes protein embeddings",
        )
        require(
            self.patience is None or self.has_validation,
            key + "patience (--patience)",
            "requires validation: set training.validation_fraction or training.validation_files",
        )
        require(
            self.label_column is None or self.label_loss_weight > 0,
            key + "label_loss_weight",
            "must be more than 0 with a label column (--label-column), or the head would stay untrained",
        )
        for name in ("lora_rank", "new_aux_values"):
            require(
                not getattr(self, name) or self.checkpoint_path is not None,
                key + name,
                "requires --checkpoint-path",
            )

    @property
    def has_validation(self) -> bool:
        """Whether cells are held out for validation."""
        return bool(self.validation_files) or self.validation_fraction > 0


@dataclass
class TrainConfig:
    """The complete configuration of `transcriptformer train`."""

    model: TrainedModel
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        training, has_gene_head = self.training, self.model.loss_config.gene_id_loss_weight > 0
        require(
            has_gene_head or not training.gene_loss_weight,
            "training.gene_loss_weight",
            "requires a gene head: set model.loss_config.gene_id_loss_weight above 0",
        )
        require(max(self.gene_loss_weight, *self.other_loss_weights) > 0, "training", "all loss weights are 0")

    @property
    def gene_loss_weight(self) -> float:
        """Weight of the gene loss."""
        weight = self.training.gene_loss_weight
        return self.model.loss_config.gene_id_loss_weight if weight is None else weight

    @property
    def other_loss_weights(self) -> tuple[float, float]:
        """Weights of the count and label losses."""
        training = self.training
        return training.count_loss_weight, training.label_loss_weight if training.label_column else 0.0


def load_train_config(
    options: Mapping[str, object] | None = None, overrides: Sequence[str] = (), recipe: Path | None = None
) -> TrainConfig:
    """Merge defaults, YAML, checkpoint, recipe, options and overrides into one validated configuration.

    Parameters
    ----------
    options
        Values by dotted path; None means "not given".
    overrides
        `dotted.path=value` in Hydra's grammar, applied last.
    recipe
        A YAML file with any subset of the keys of `conf/train_config.yaml`.

    Raises
    ------
    UsageError
        If an option, an override or the recipe has an unknown key, a wrong type or an invalid value, or if training
        files or a starting point are missing.
    CheckpointError
        If the checkpoint's `config.json` is invalid.
    """
    options = options or {}
    own = _read_recipe(recipe) if recipe else OmegaConf.create()
    defaults: Any = OmegaConf.load(conf_dir() / "train_config.yaml")
    key = "training.checkpoint_path"
    given = {key: value for key, value in options.items() if value is not None} | dict(map(parse_override, overrides))
    start = given[key] if key in given else OmegaConf.select(own, key)
    if start is None:
        config = OmegaConf.merge(OmegaConf.structured(TrainConfig), defaults)
    else:
        folder = Path(str(start))
        if not folder.is_dir():
            raise UsageError(f"--checkpoint-path {folder}: no such folder")
        with config_json_errors(folder / "config.json"):
            config = OmegaConf.merge(OmegaConf.structured(TrainConfig), _without_model(defaults), _trained(folder))
            trained = OmegaConf.to_object(config)
    try:
        config = OmegaConf.merge(config, own)
    except OmegaConfBaseException as error:
        raise UsageError(f"--config {recipe}: {error.full_key!r}: {one_line(error)}") from error
    assert isinstance(config, DictConfig)
    checked = finish_config(config, options, overrides)
    assert isinstance(checked, TrainConfig)
    if start is not None:
        _check_vocabularies(checked, trained)
    return _complete(checked)


def _read_recipe(path: Path) -> Any:
    try:
        recipe = OmegaConf.load(path)
        if not isinstance(recipe, DictConfig) or not all(isinstance(recipe[key], DictConfig) for key in recipe):
            raise UsageError(f"--config {path}: must have the sections of conf/train_config.yaml, model and training")
        return recipe
    except FileNotFoundError:
        raise UsageError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"--config {path}: not valid YAML ({one_line(error)})") from error


_VOCABULARIES = ("aux_cols", "esm2_mappings", "special_tokens", "gene_pad_token", "aux_pad_token")


def _without_model(defaults: DictConfig) -> DictConfig:
    """Drop what only applies to a model from scratch, even if a checkpoint leaves it unset."""
    model = {"data_config": {key: v for key, v in defaults.model.data_config.items() if key not in _VOCABULARIES}}
    return OmegaConf.create({"model": model, "training": defaults.training})


def _trained(folder: Path) -> dict[str, Any]:
    """Read the sections that a checkpoint sets."""
    sections = read_checkpoint_config(folder)["model"]
    data = {key: value for key, value in sections["data_config"].items() if key in (*_VOCABULARIES, *COUNT_SETTINGS)}
    if data.get("sort_genes"):
        data["randomize_genes"] = False
    return {"model": {**sections, "data_config": data}}


def _check_vocabularies(config: TrainConfig, trained: Any) -> None:
    """Raise UsageError if a recipe, an option or an override would replace a vocabulary of the checkpoint."""
    for name in _VOCABULARIES:
        given, expected = (getattr(source.model.data_config, name) for source in (config, trained))
        require(
            given == expected,
            f"model.data_config.{name}",
            f"is {given}, but the checkpoint was trained with {expected}; remove it",
        )


def _complete(config: TrainConfig) -> TrainConfig:
    """Derive values from others, and require training files and a starting point."""
    training, data = config.training, config.model.data_config
    require(bool(training.data_files), "training.data_files (--data-file)", "no training files")
    if training.checkpoint_path is None:
        require(
            bool(training.protein_embeddings),
            "training.protein_embeddings (--protein-embedding)",
            "training requires protein embeddings, or a checkpoint to start from (--checkpoint-path)",
        )
        data.esm2_mappings = [Path(file).name for file in training.protein_embeddings]
        require(
            len(set(data.esm2_mappings)) == len(data.esm2_mappings),
            "training.protein_embeddings (--protein-embedding)",
            f"file names are not unique: {', '.join(data.esm2_mappings)}",
        )
        config.model.model_config.aux_len = len(data.aux_cols)
    unknown = [column for column in training.new_aux_values if column not in data.aux_cols]
    require(
        not unknown,
        "training.new_aux_values (--new-assay)",
        f"the checkpoint has no vocabulary for {', '.join(unknown)}; it has {', '.join(data.aux_cols) or 'none'}",
    )
    return config
