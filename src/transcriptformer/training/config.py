"""What can be set for `transcriptformer train`: `model`, which goes into the checkpoint's config.json, and `training`.

Values are layered, later ones winning: the defaults below, `conf/train_config.yaml`, a recipe (`--config`), options,
overrides. A checkpoint that is trained on brings its architecture, losses, vocabularies and treatment of counts, in
place of what the YAML says of a model from scratch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from transcriptformer.checkpoint.published import faults_of, read_checkpoint_config
from transcriptformer.config import (
    MOST_INT,
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
"""What a new value of a metadata column starts from, if not from another value: the mean of those that are known."""


MOST_WEIGHT = 1e6
"""Greatest weight of a loss or of a file."""

_RANGES = {
    "max_epochs (--max-epochs)": (1, 10**6),
    "max_steps (--max-steps)": (1, MOST_INT),
    "patience (--patience)": (1, MOST_INT),
    "batch_size (--batch-size)": (1, MOST_INT),
    "tokens_per_batch": (1, MOST_INT),
    "final_learning_rate_share": (0, 1),
    "warmup_share": (0, 1),
    "weight_decay": (0, 1e3),
    "clip_gradients": (0, 1e30),
    "gene_loss_weight": (0, MOST_WEIGHT),
    "count_loss_weight": (0, MOST_WEIGHT),
    "label_loss_weight": (0, MOST_WEIGHT),
    "lora_rank (--lora-rank)": (0, 2**16),
    "lora_alpha": (0, 1e6),
    "seed (--seed)": (0, 2**63 - 1),
    "streams": (1, 2**16),
    "block_size": (1, 2**24),
    "blocks_to_mix": (1, 2**16),
    "validate_every": (1, MOST_INT),
    "save_every": (1, MOST_INT),
    "log_every": (1, MOST_INT),
}


@dataclass
class TrainingConfig(ComputeConfig):
    """A run of `transcriptformer train` (`training`)."""

    data_files: list[str] = field(default_factory=list)
    """h5ad files or zarr stores with raw counts; a name may hold the wildcards * and **."""
    data_weights: list[float] = field(default_factory=list)
    """Passes over each of `data_files` in an epoch, which may be fractions; empty: one over every file."""
    validation_files: list[str] = field(default_factory=list)
    """Files whose cells are validated on, and not learned from."""
    validation_fraction: float = 0.1
    """Share of the cells of `data_files` that is validated on where there are no `validation_files`; 0: none."""
    checkpoint_path: str | None = None
    """Folder of the checkpoint that training starts from; None: from scratch."""
    protein_embeddings: list[str] = field(default_factory=list)
    """Protein-embedding files whose genes are the vocabulary, from scratch."""
    new_aux_values: dict[str, dict[str, str]] = field(default_factory=dict)
    """Values to append to the vocabulary of a metadata column, and the known value that each starts from, or `mean`."""
    label_column: str | None = None
    """Column of `obs` with the labels, such as cell types, that a head learns to tell from the cell embedding."""
    freeze: list[str] | None = None
    """Modules that are not trained, such as transformer_encoder.encoder_layers.0; None: none of them, or, with LoRA,
    all that were there before."""
    lora_rank: int = 0
    """Rank of the updates that are learned for attention and feed-forward instead of their weights; 0: no LoRA."""
    lora_alpha: float = 16.0
    """The updates are scaled by lora_alpha / lora_rank."""
    output_path: str = "./training_results"
    """Folder of what comes out."""
    max_epochs: int = 10
    """Passes over the training cells."""
    max_steps: int | None = None
    """Most steps of the optimizer, if fewer than `max_epochs` take."""
    patience: int | None = None
    """Stop after this many validations in a row without a better loss; None: never."""
    batch_size: int = 64
    """Cells in a step of the optimizer, of all processes together."""
    tokens_per_batch: int | None = None
    """Most positions that a process computes at a time; a step of more is accumulated. None: as suits the device."""
    learning_rate: float = 3e-4
    """At its highest."""
    final_learning_rate_share: float = 0.1
    """Share of it that is left at the end, after a cosine."""
    warmup_share: float = 0.05
    """Share of the steps in which the learning rate rises linearly from 0."""
    weight_decay: float = 0.1
    """AdamW's; it spares norms, biases and embeddings."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two."""
    clip_gradients: float = 1.0
    """Gradients whose norm is above this are scaled down to it; 0: never."""
    gene_loss_weight: float | None = None
    """Weight of the genes' cross-entropy; None: model.loss_config.gene_id_loss_weight (where 0 means: no gene head)."""
    count_loss_weight: float = 1.0
    """Weight of the counts' negative log-likelihood."""
    label_loss_weight: float = 1.0
    """Weight of the labels' cross-entropy."""
    start_from_frequencies: bool = True
    """From scratch, begin with heads that say how often each gene occurs, and how high."""
    attention: str = "auto"
    """blockwise: long cells in blocks; flex: compiled, on a GPU; plain; or auto: flex on a GPU, elsewhere blockwise."""
    seed: int = 0
    """Of weights, order, dropout and the choice of validation cells."""
    streams: int = 8
    """Parts of the shuffled cells that are read side by side; as long as processes and their workers are no more than
    these, they do not change the order."""
    block_size: int = 128
    """Consecutive cells that are read at once."""
    blocks_to_mix: int = 16
    """Blocks of a stream that are in memory and shuffled with each other."""
    validate_every: int | None = None
    """Steps between validations; None: once per epoch."""
    save_every: int = 500
    """Steps between saving what a killed run goes on from."""
    log_every: int = 10
    """Steps between lines in metrics.csv."""

    def __post_init__(self) -> None:
        key = "training."
        require(
            not self.data_weights or len(self.data_weights) == len(self.data_files),
            key + "data_weights",
            f"{len(self.data_weights)} weights for {len(self.data_files)} data_files",
        )
        is_weight = all(0 < weight <= MOST_WEIGHT for weight in self.data_weights)
        require(is_weight, key + "data_weights", f"must be more than 0, at most {MOST_WEIGHT:g}")
        require(0 <= self.validation_fraction < 1, key + "validation_fraction", "must be from 0 to less than 1")
        require_ranges(self, key, _RANGES)
        require_positive(self, key, {"learning_rate (--learning-rate)": 1e30})
        require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), key + "betas", "must be two, below 1")
        self.require_computable(key)
        require_one_of(self.attention, ("auto", "blockwise", "flex", "plain"), key + "attention")
        require(
            self.checkpoint_path is None or not self.protein_embeddings,
            key + "protein_embeddings (--protein-embedding)",
            "is for training from scratch; a checkpoint (--checkpoint-path) brings its own",
        )
        require(
            self.patience is None or self.has_validation,
            key + "patience (--patience)",
            "needs cells to validate on: training.validation_fraction, or validation_files",
        )
        for name in ("lora_rank", "new_aux_values"):
            require(
                not getattr(self, name) or self.checkpoint_path is not None,
                key + name,
                "speaks of a checkpoint to start from: it needs --checkpoint-path",
            )

    @property
    def has_validation(self) -> bool:
        """Whether some cells are kept to validate on."""
        return bool(self.validation_files) or self.validation_fraction > 0


@dataclass
class TrainConfig:
    """The whole configuration of `transcriptformer train`."""

    model: TrainedModel
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        training, has_gene_head = self.training, self.model.loss_config.gene_id_loss_weight > 0
        require(
            has_gene_head or not training.gene_loss_weight,
            "training.gene_loss_weight",
            "needs a gene head, which a model.loss_config.gene_id_loss_weight above 0 brings",
        )
        require(max(self.gene_loss_weight, *self.other_loss_weights) > 0, "training", "all weights of losses are 0")

    @property
    def gene_loss_weight(self) -> float:
        """What the genes' loss counts for."""
        weight = self.training.gene_loss_weight
        return self.model.loss_config.gene_id_loss_weight if weight is None else weight

    @property
    def other_loss_weights(self) -> tuple[float, float]:
        """What the losses of counts and of labels count for."""
        training = self.training
        return training.count_loss_weight, training.label_loss_weight if training.label_column else 0.0


def load_train_config(
    options: Mapping[str, object] | None = None, overrides: Sequence[str] = (), recipe: Path | None = None
) -> TrainConfig:
    """Layer defaults, YAML, checkpoint, recipe, options and overrides into one checked configuration.

    Parameters
    ----------
    options
        Dotted path → value; None means "not given".
    overrides
        `dotted.path=value` in Hydra's grammar, applied last.
    recipe
        A YAML file of the form of `conf/train_config.yaml`, with any part of its keys.

    Raises
    ------
    UsageError
        If an option, an override or the recipe has an unknown key, a wrong type or an impossible value, or nothing is
        there to start from or to learn from.
    CheckpointError
        If the checkpoint's `config.json` cannot be used.
    """
    options = options or {}
    own = _read_recipe(recipe) if recipe else OmegaConf.create()
    defaults: Any = OmegaConf.load(conf_dir() / "train_config.yaml")
    given = dict(map(parse_override, overrides))
    start = (
        given.get("training.checkpoint_path")
        or options.get("training.checkpoint_path")
        or OmegaConf.select(own, "training.checkpoint_path")
    )
    if start is None:
        config = OmegaConf.merge(OmegaConf.structured(TrainConfig), defaults)
    else:
        folder = Path(str(start))
        if not folder.is_dir():
            raise UsageError(f"--checkpoint-path {folder}: no such folder")
        with faults_of(folder / "config.json"):
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
            raise UsageError(
                f"--config {path}: not of the form of conf/train_config.yaml, with parts model and training"
            )
        return recipe
    except FileNotFoundError:
        raise UsageError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"--config {path}: not readable as YAML ({one_line(error)})") from error


_VOCABULARIES = ("aux_cols", "esm2_mappings", "special_tokens", "gene_pad_token", "aux_pad_token")
_COUNTS = ("clip_counts", "normalize_to_scale", "sort_genes")
"""Settings of data that a model is trained for. Which cells, and where files hold what, is asked anew."""


def _without_model(defaults: DictConfig) -> DictConfig:
    """The YAML without what it says of a model from scratch; not even where a checkpoint says nothing does it hold."""
    model = {"data_config": {key: v for key, v in defaults.model.data_config.items() if key not in _VOCABULARIES}}
    return OmegaConf.create({"model": model, "training": defaults.training})


def _trained(folder: Path) -> dict[str, Any]:
    """What a checkpoint says it was trained for."""
    sections = read_checkpoint_config(folder)["model"]
    data = {key: value for key, value in sections["data_config"].items() if key in (*_VOCABULARIES, *_COUNTS)}
    if data.get("sort_genes"):
        data["randomize_genes"] = False
    return {"model": {**sections, "data_config": data}}


def _check_vocabularies(config: TrainConfig, trained: Any) -> None:
    """Raise UsageError where a recipe, an option or an override would replace a vocabulary of the checkpoint."""
    for name in _VOCABULARIES:
        wanted, there = (getattr(of.model.data_config, name) for of in (config, trained))
        require(
            wanted == there,
            f"model.data_config.{name}",
            f"is {wanted}, but the checkpoint was trained with {there}; leave it out",
        )


def _complete(config: TrainConfig) -> TrainConfig:
    """Fill in what follows from other values, and see that there is something to do."""
    training, data = config.training, config.model.data_config
    require(bool(training.data_files), "training.data_files (--data-file)", "there is no file to learn from")
    if training.checkpoint_path is None:
        require(
            bool(training.protein_embeddings),
            "training.protein_embeddings (--protein-embedding)",
            "there is nothing to start from: give the genes' protein embeddings, or a checkpoint (--checkpoint-path)",
        )
        data.esm2_mappings = [Path(file).name for file in training.protein_embeddings]
        require(
            len(set(data.esm2_mappings)) == len(data.esm2_mappings),
            "training.protein_embeddings (--protein-embedding)",
            f"two files bear one name: {', '.join(data.esm2_mappings)}",
        )
        config.model.model_config.aux_len = len(data.aux_cols)
    unknown = [column for column in training.new_aux_values if column not in data.aux_cols]
    require(
        not unknown,
        "training.new_aux_values (--new-assay)",
        f"the checkpoint has no vocabulary for {', '.join(unknown)}; it has: {', '.join(data.aux_cols) or 'none'}",
    )
    return config
