"""The settings of the model, its data and inference: one dataclass per section, documented field by field.

The dotted paths (`model.data_config.clip_counts`, …) are those of the published package.
`transcriptformer.checkpoint.published.load_config` fills them; the settings of `transcriptformer train` are in
`transcriptformer.training.config`.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigIndexError, OmegaConfBaseException

from transcriptformer.errors import UsageError

LINK_FUNCTIONS = ("exp", "log", "relu", "sigmoid", "softplus", "linear", "softmax")
ACTIVATIONS = ("gelu", "relu")
MOST_GPUS = 2**12


def require(condition: bool, key: str, message: str) -> None:
    """Raise UsageError, naming `key`, unless a condition holds."""
    if not condition:
        raise UsageError(f"{key}: {message}")


def require_ranges(section: object, key: str, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise UsageError unless the fields of a section lie in their ranges, both ends included; None lies in each.

    Parameters
    ----------
    key
        Path of the section, with a dot at its end.
    ranges
        Field, which an option may follow in brackets → least and greatest value. NaN lies in none.
    """
    for label, (least, greatest) in ranges.items():
        value = getattr(section, label.partition(" ")[0])
        message = f"must be from {_number(least)} to {_number(greatest)}, not {value!s:.40}"
        require(value is None or least <= value <= greatest, key + label, message)


def require_positive(section: object, key: str, greatest: Mapping[str, float]) -> None:
    """Raise UsageError unless the fields of a section are more than 0 and no more than the greatest value of each."""
    for label, most in greatest.items():
        value = getattr(section, label.partition(" ")[0])
        require(0 < value <= most, key + label, f"must be more than 0, at most {_number(most)}, not {value!s:.40}")


def require_gpus(num_gpus: int, key: str) -> None:
    """Raise UsageError unless it is a number of devices, or -1 for all."""
    is_number = num_gpus == -1 or 1 <= num_gpus <= MOST_GPUS
    require(is_number, key + "num_gpus (--num-gpus)", f"must be from 1 to {MOST_GPUS:,}, or -1, not {num_gpus!s:.40}")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def require_one_of(value: object, allowed: Sequence[object], key: str) -> None:
    """Raise UsageError, naming `key`, unless `value` is one of those allowed."""
    require(value in allowed, key, f"{value!r} is not one of {', '.join(map(str, allowed))}")


def is_plain_name(name: str) -> bool:
    """Whether a name can only be that of a file in the folder that it is joined to."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


MOST_COUNTS = 1e30
"""Greatest value of what counts are compared or multiplied with; float32 ends at 3e38."""

MOST_INT = 2**31 - 1

_DATA_RANGES = {
    "filter_outliers": (0, 1e6),
    "min_expressed_genes": (0, MOST_INT),
    "normalize_to_scale": (0, MOST_COUNTS),
    "seed": (0, 2**63 - 1),
    "n_data_workers (--n-data-workers)": (0, 1024),
    "block_size": (1, 2**24),
}

_MODEL_RANGES = {
    "num_layers": (1, 1000),
    "num_heads": (1, 2**16),
    "embed_dim": (1, 2**16),
    "model_dim": (1, 2**20),
    "gene_head_hidden_dim": (1, 2**20),
    "seq_len": (1, 2**20),
    "aux_len": (0, 1024),
    "dropout": (0, 1),
    "softcap": (0, 1e6),
    "log_counts_eps": (0, 1),
}
"""Some orders of magnitude above the largest published model."""

_INFERENCE_RANGES = {"tokens_per_batch": (1, 2**62)}


@dataclass
class DataConfig:
    """From counts to tokens (`model.data_config`)."""

    gene_col_name: str = "ensembl_id"
    """Column of `var` that holds the gene ids; `index`: the index of `var`; `auto`: `ensembl_id`, else the index."""
    layer: str | None = None
    """Layer that holds the counts; None: `use_raw` says where they are."""
    use_raw: bool | str | None = None
    """True: `.raw.X`; False: `.X`; "auto" or None: `.raw.X` where there is one, else `.X`."""
    remove_duplicate_genes: bool = False
    """Keep the first column of each gene id instead of refusing a file with duplicates."""
    filter_to_vocabs: bool = True
    """Drop genes outside the vocabulary; otherwise they become the token `unknown`."""
    filter_outliers: float = 0.0
    """Keep cells whose total lies within this many standard deviations of the file's mean; 0: keep all."""
    min_expressed_genes: int = 0
    """Keep cells that express at least this many genes of the vocabulary."""
    normalize_to_scale: float = 0.0
    """Scale the counts of every cell to this sum before clipping; 0: leave them."""
    clip_counts: float = 30
    """Counts above this are set to it."""
    sort_genes: bool = False
    """Order a cell's genes by count, descending, instead of the file's column order."""
    randomize_genes: bool = False
    """Shuffle a cell's genes (the same shuffle for the same `seed` and cell)."""
    seed: int = 0
    """Seed of `randomize_genes`."""
    n_data_workers: int = 0
    """Worker processes that prepare batches; 0: the main process does."""
    block_size: int = 2048
    """Most consecutive cells that are read at once; batches are formed among these, by length."""
    allow_external_links: bool = False
    """Follow links in inputs and vocabularies to other files: HDF5 external links, external raw data, virtual datasets;
    symbolic links out of a zarr store or `vocabs/`; URLs that lead to other URLs."""
    aux_cols: list[str] = field(default_factory=list)
    """Columns of `obs` that become auxiliary tokens, one vocabulary each."""
    esm2_mappings: list[str] = field(default_factory=list)
    """Protein-embedding files in `vocabs/`, in the order of the gene vocabulary."""
    special_tokens: list[str] = field(
        default_factory=lambda: ["unknown", "[PAD]", "[START]", "[END]", "[RD]", "[CELL]", "[MASK]"]
    )
    """First tokens of the gene vocabulary, in the order of their ids."""
    gene_pad_token: str = "[PAD]"
    """Special token after a cell's last gene."""
    aux_pad_token: str = "unknown"
    """Auxiliary token of a value outside its vocabulary."""

    def __post_init__(self) -> None:
        key = "model.data_config."
        require_one_of(self.use_raw, (True, False, None, "auto"), key + "use_raw (--use-raw)")
        require_positive(self, key, {"clip_counts (--clip-counts)": MOST_COUNTS})
        require_ranges(self, key, _DATA_RANGES)
        for name in self.esm2_mappings:
            require(is_plain_name(name), key + "esm2_mappings", f"{name!r} is not the name of a file in vocabs/")
        for name in self.aux_cols:
            is_name = is_plain_name(name) and "." not in name  # the vocabulary's file and its weights are named so
            require(is_name, key + "aux_cols", f"{name!r} holds a dot or a slash, or is empty")
        for field_name in ("aux_cols", "special_tokens"):
            names = getattr(self, field_name)
            require(len(set(names)) == len(names), key + field_name, f"a name is there twice: {', '.join(names)}")
        require(
            not (self.sort_genes and self.randomize_genes),
            key + "sort_genes",
            "cannot be combined with randomize_genes",
        )


@dataclass
class ModelConfig:
    """The architecture, as trained (`model.model_config`)."""

    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Attention heads per block."""
    embed_dim: int
    """Width of a token's state, D."""
    model_dim: int
    """Width of the feed-forward layer."""
    seq_len: int
    """Most gene positions of a cell, L."""
    aux_len: int = 0
    """Auxiliary tokens in front of the genes, A."""
    dropout: float = 0.1
    """Dropout of the feed-forward layer and the MLPs while training."""
    activation: str = "gelu"
    """Activation of the feed-forward layer."""
    fw_bias: bool = False
    """Biases in the feed-forward layer."""
    attn_bias: bool = False
    """Biases in the projections of the attention."""
    softcap: float = 10.0
    """Scores and gene logits s become softcap · tanh(s / softcap); 0: left alone."""
    log_counts_eps: float = 1e-6
    """Added to counts before a logarithm."""
    mu_link_fn: str = "softmax"
    """From the count head's output to expected counts."""
    gene_head_hidden_dim: int = 2048
    """Width of the gene head's hidden layer."""

    def __post_init__(self) -> None:
        key = "model.model_config."
        require_ranges(self, key, _MODEL_RANGES)
        require(self.embed_dim % self.num_heads == 0, key + "embed_dim", "must be a multiple of num_heads")
        require_one_of(self.activation, ACTIVATIONS, key + "activation")
        require_one_of(self.mu_link_fn, LINK_FUNCTIONS, key + "mu_link_fn")


@dataclass
class LossConfig:
    """The training losses (`model.loss_config`)."""

    gene_id_loss_weight: float = 1.0
    """Weight of the gene cross-entropy; a checkpoint trained with 0 has no gene head."""
    softplus_approx: bool = True
    """Compute the zero-truncated Poisson's log(eˣ − 1) as x − softplus(−x)."""

    def __post_init__(self) -> None:
        require_ranges(self, "model.loss_config.", {"gene_id_loss_weight": (0, 1e6)})


PRECISIONS = ("16-mixed", "bf16-mixed", "32")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass
class ComputeConfig:
    """Where and how a run computes, whatever it computes."""

    precision: str = "16-mixed"
    """32; bf16-mixed; or 16-mixed: fp16 on a GPU, on a CPU bf16 where it has bf16 matrix instructions, else 32."""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the first of cuda, mps, cpu that is available."""
    num_gpus: int = 1
    """Devices to run on, one process each; -1: all GPUs. On a CPU: processes."""
    num_nodes: int = 1
    """Machines to run on; start the command on each."""
    resume: bool = False
    """Continue an interrupted run."""

    def require_computable(self, key: str) -> None:
        """Raise UsageError where a setting has an impossible value; `key` is the path of the section, with a dot."""
        require_one_of(self.precision, PRECISIONS, key + "precision (--precision)")
        require_one_of(self.device, DEVICES, key + "device (--device)")
        require_gpus(self.num_gpus, key)
        require_ranges(self, key, {"num_nodes (--num-nodes)": (1, 2**16)})


@dataclass
class InferenceConfig(ComputeConfig):
    """A run of `transcriptformer inference` (`model.inference_config`)."""

    batch_size: int | str = "auto"
    """Most cells in a batch; auto: as many as suit the device and fit into its free memory."""
    tokens_per_batch: int | None = None
    """Most positions in a batch, padding included; None: as many as suit the device."""
    attention: str = "auto"
    """blockwise; flex: compiled by PyTorch's FlexAttention; plain: the slow one that defines the numbers; or auto: flex
    where it is faster and the run long enough, else blockwise."""
    embedding_layer_index: int = -1
    """Block whose output is the embedding, from 0; negative from the end."""
    emb_type: str = "cell"
    """cell: one mean vector per cell; cge: one contextual vector per gene and cell."""
    cge_pool: str | None = None
    """gene: the mean of the contextual vectors of each gene; a column of obs: of each gene and value; None: all."""
    output_keys: list[str] = field(default_factory=lambda: ["embeddings"])
    """What to compute: embeddings, llh."""
    predict_labels: bool = True
    """With cell embeddings of a checkpoint that was trained to tell labels, add its predictions to `obs`."""
    obs_keys: list[str] = field(default_factory=lambda: ["all"])
    """Columns of `obs` to keep in the output; `all`: every one."""
    output_path: str = "./inference_results"
    """Folder of the output file."""
    output_filename: str = "embeddings.h5ad"
    """Name of the output; .h5ad makes a file, .zarr a store."""
    pretrained_embedding: list[str] = field(default_factory=list)
    """Protein-embedding files of a species that the checkpoint was not trained on; their genes replace its own."""
    reference_stale_indices: bool = False
    """Reproduce what the published package computes for a new species, whose model looks for the special tokens at the
    places of the old ones: every cell is padded to full length and padding counts as genes."""
    oom_dataloader: bool = True
    """Read counts in blocks as they are needed; False: read files into memory first."""

    def __post_init__(self) -> None:
        key = "model.inference_config."
        require(
            self.batch_size == "auto" or (isinstance(self.batch_size, int) and 0 < self.batch_size <= MOST_INT),
            key + "batch_size (--batch-size)",
            f"must be at least 1, or auto, not {self.batch_size}",
        )
        require_ranges(self, key, _INFERENCE_RANGES)
        self.require_computable(key)
        require_one_of(self.attention, ("auto", "blockwise", "flex", "plain"), key + "attention")
        require_one_of(self.emb_type, ("cell", "cge"), key + "emb_type (--emb-type)")
        require(
            all(isinstance(name, str) for name in self.obs_keys), key + "obs_keys", "must be a list of column names"
        )
        for output_key in self.output_keys:
            require_one_of(output_key, ("embeddings", "llh"), key + "output_keys")
        require(len(self.output_keys) > 0, key + "output_keys", "must name at least one of embeddings, llh")
        require(
            Path(self.output_filename).name == self.output_filename
            and self.output_filename.endswith((".h5ad", ".zarr")),
            key + "output_filename (--output-filename)",
            f"{self.output_filename!r} is not a name that ends in .h5ad or .zarr (the folder goes into --output-path)",
        )
        require(
            self.cge_pool is None or (self.emb_type == "cge" and self.output_keys == ["embeddings"]),
            key + "cge_pool (--cge-pool)",
            "needs --emb-type cge, and embeddings as the only output key",
        )
        require(
            not self.reference_stale_indices or len(self.pretrained_embedding) > 0,
            key + "reference_stale_indices",
            "speaks of a new species: it needs --pretrained-embedding",
        )


@dataclass
class TrainedModel:
    """What a checkpoint says of itself (`model`): how it was trained."""

    model_config: ModelConfig
    data_config: DataConfig = field(default_factory=DataConfig)
    loss_config: LossConfig = field(default_factory=LossConfig)


@dataclass
class ModelSection(TrainedModel):
    """Everything below `model.`: a trained model, and what to do with it."""

    inference_config: InferenceConfig = field(default_factory=InferenceConfig)
    model_type: str = "transcriptformer"
    """transcriptformer; or esm2ce, the protein embeddings of a cell's genes without a transformer."""

    def __post_init__(self) -> None:
        require_one_of(self.model_type, ("transcriptformer", "esm2ce"), "model.model_type (--model-type)")
        require(
            self.model_type == "transcriptformer" or self.inference_config.output_keys == ["embeddings"],
            "model.inference_config.output_keys",
            "esm2ce has embeddings only",
        )
        layer, num_layers = self.inference_config.embedding_layer_index, self.model_config.num_layers
        require(
            -num_layers <= layer < num_layers,
            "model.inference_config.embedding_layer_index (--embedding-layer-index)",
            f"the checkpoint has {num_layers} layers, {layer} is outside {-num_layers}…{num_layers - 1}",
        )


@dataclass
class Config:
    """The whole configuration."""

    model: ModelSection

    def to_json(self) -> str:
        """Every value, as JSON."""
        return json.dumps(asdict(self))


def conf_dir() -> Path:
    """Folder of the YAML files with defaults."""
    return shipped_file("conf/inference_config.yaml").parent


def shipped_file(name: str) -> Path:
    """A file that comes with the package: inside it where it is installed, or beside `src` in a checkout."""
    here = Path(__file__).resolve()
    for folder in (here.parent, here.parents[2]):
        if (folder / name).is_file():
            return folder / name
    raise RuntimeError(f"{name} is missing: the installation of transcriptformer is damaged")


def finish_config(config: DictConfig, options: Mapping[str, object], overrides: Sequence[str]) -> object:
    """Put options, then overrides, on top of `config` and turn it into its checked dataclass.

    Raises
    ------
    UsageError
        If one of them has an unknown key, a wrong type or an impossible value.
    """
    for key, value in options.items():
        if value is not None:
            _update(config, key, value)
    for override in overrides:
        _update(config, *parse_override(override))
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UsageError(f"{full_key(error)}: {first_line(error)}") from error


def parse_override(override: str) -> tuple[str, object]:
    """Key and value of an override in Hydra's grammar."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UsageError(
            f"--config-override {override!r}: not of the form key.path=value ({first_line(error)})"
        ) from error
    if parsed.is_add() or parsed.is_delete() or parsed.is_sweep_override() or parsed.package is not None:
        raise UsageError(f"--config-override {override!r}: give one plain key.path=value (a list as [a,b])")
    return parsed.key_or_group, parsed.value()


def _update(config: DictConfig, key: str, value: object) -> None:
    try:
        OmegaConf.update(config, key, value)
    except ConfigIndexError as error:
        parent, _, index = key.rpartition(".")
        items = OmegaConf.select(config, parent)
        if not (isinstance(items, ListConfig) and index == str(len(items))):
            raise UsageError(f"{key}: {first_line(error)}") from error
        items.append(value)
    except (AttributeError, KeyError) as error:  # OmegaConf's own errors of these kinds: there is no such key
        values = OmegaConf.to_container(config)
        assert isinstance(values, dict)
        close = difflib.get_close_matches(key, [key for key, _ in leaves(values)], n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"{key}: no such configuration key{hint}") from error
    except (OmegaConfBaseException, ValueError, OverflowError) as error:
        raise UsageError(f"{key}: {first_line(error)}") from error


def leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values with their dotted paths."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def full_key(error: OmegaConfBaseException) -> str:
    """Dotted path of the value that an error is about."""
    return repr(error.full_key)


def first_line(error: Exception) -> str:
    """First line of an error's message, at most 300 characters."""
    return str(error).split("\n", maxsplit=1)[0][:300]
