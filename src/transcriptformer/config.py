"""Settings of the model, data and inference: one dataclass per section, each field documented.

The dotted paths (`model.data_config.clip_counts`, …) match the published package. They are filled by
`transcriptformer.checkpoint.published.load_config`; training settings are in `transcriptformer.training.config`.
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
MAX_GPUS = 2**12


def require(condition: bool, key: str, message: str) -> None:
    """Raise UsageError naming `key` unless `condition` holds."""
    if not condition:
        raise UsageError(f"{key}: {message}")


def require_ranges(section: object, key: str, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise UsageError unless each field of a section is None or within its range, bounds included.

    Parameters
    ----------
    key
        Path of the section, ending in a dot.
    ranges
        Field name, optionally followed by its option in parentheses → minimum and maximum. NaN is never in range.
    """
    for label, (minimum, maximum) in ranges.items():
        value = getattr(section, label.partition(" ")[0])
        message = f"must be from {_format_number(minimum)} to {_format_number(maximum)}, not {value!s:.40}"
        require(value is None or minimum <= value <= maximum, key + label, message)


def require_positive(section: object, key: str, maxima: Mapping[str, float]) -> None:
    """Raise UsageError unless each field of a section is greater than 0 and at most its maximum."""
    for label, maximum in maxima.items():
        value = getattr(section, label.partition(" ")[0])
        message = f"must be more than 0, at most {_format_number(maximum)}, not {value!s:.40}"
        require(0 < value <= maximum, key + label, message)


def require_gpus(num_gpus: int, key: str) -> None:
    """Raise UsageError unless `num_gpus` is a valid number of devices, or -1 for all."""
    is_valid = num_gpus == -1 or 1 <= num_gpus <= MAX_GPUS
    require(is_valid, key + "num_gpus (--num-gpus)", f"must be from 1 to {MAX_GPUS:,}, or -1, not {num_gpus!s:.40}")


def _format_number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def require_one_of(value: object, allowed: Sequence[object], key: str) -> None:
    """Raise UsageError naming `key` unless `value` is allowed."""
    require(value in allowed, key, f"{value!r} is not one of {', '.join(map(str, allowed))}")


def is_plain_name(name: str) -> bool:
    """Whether a name, joined to a folder, stays inside it."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


MAX_COUNTS = 1e30
"""Maximum of settings that counts are compared with or scaled to; float32 overflows at 3e38."""

MAX_INT = 2**31 - 1

_DATA_RANGES = {
    "filter_outliers": (0, 1e6),
    "min_expressed_genes": (0, MAX_INT),
    "normalize_to_scale": (0, MAX_COUNTS),
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
    "softcap": (0, 1000),
    "log_counts_eps": (0, 1),
}
"""Orders of magnitude above the largest published model."""

_INFERENCE_RANGES = {"tokens_per_batch": (1, 2**62)}


@dataclass
class DataConfig:
    """Preprocessing of counts into tokens (`model.data_config`)."""

    gene_col_name: str = "auto"
    """Column of `var` with gene ids; `index`: its index; `auto`: the one with most genes of the vocabulary."""
    gene_map: str | None = None
    """File that maps gene symbols to ids (TSV, GTF, FASTA or h5ad); None: the shipped maps of human and mouse."""
    modality: str = "rna"
    """Modality of a MuData (.h5mu or .zarr) with the counts."""
    layer: str | None = None
    """Layer with the counts; None: see `use_raw`."""
    use_raw: bool | str | None = None
    """True: counts in `.raw.X`; False: in `.X`; "published": `.raw.X` if present, else `.X`; "auto" or None: the first
    of `.raw.X`, `.X` and layers named like counts that holds whole numbers."""
    recover_counts: bool = False
    """Recover counts from log-normalized or normalized values whose smallest step can be read off exactly."""
    duplicate_genes: str = "error"
    """error, first (keep the first column of each gene) or sum (add the columns of a gene)."""
    remove_duplicate_genes: bool = False
    """The published name of `duplicate_genes: first`."""
    filter_to_vocabs: bool = True
    """Drop genes outside the vocabulary instead of mapping them to `unknown`."""
    filter_outliers: float = 0.0
    """Maximum deviation of a cell's total counts from the file's mean, in standard deviations; 0: no limit."""
    min_expressed_genes: int = 0
    """Minimum number of expressed vocabulary genes per cell."""
    normalize_to_scale: float = 0.0
    """Scale each cell to this total before clipping; 0: do not scale."""
    clip_counts: float = 30
    """Clip counts at this value."""
    sort_genes: bool = False
    """Sort each cell's genes by descending count instead of keeping column order."""
    randomize_genes: bool = False
    """Shuffle each cell's genes, reproducibly for a given `seed`."""
    seed: int = 0
    """Seed of `randomize_genes`."""
    n_data_workers: int = 0
    """Worker processes that prepare batches; 0: use the main process."""
    block_size: int = 2048
    """Consecutive cells read at once and grouped into batches by length."""
    allow_external_links: bool = False
    """Follow links from inputs and vocabularies to other files: HDF5 external links, external raw data and virtual
    datasets, symbolic links out of a zarr store or `vocabs/`, and URL redirects."""
    aux_cols: list[str] = field(default_factory=list)
    """Columns of `obs` used as auxiliary tokens, each with its own vocabulary."""
    esm2_mappings: list[str] = field(default_factory=list)
    """Protein-embedding files in `vocabs/`, in vocabulary order."""
    special_tokens: list[str] = field(
        default_factory=lambda: ["unknown", "[PAD]", "[START]", "[END]", "[RD]", "[CELL]", "[MASK]"]
    )
    """Special tokens at the start of the gene vocabulary, in id order."""
    gene_pad_token: str = "[PAD]"
    """Padding token for genes."""
    aux_pad_token: str = "unknown"
    """Auxiliary token for values outside the vocabulary."""

    def __post_init__(self) -> None:
        key = "model.data_config."
        require(is_plain_name(self.modality), key + "modality (--modality)", f"{self.modality!r} is not a plain name")
        require_one_of(self.use_raw, (True, False, None, "auto", "published"), key + "use_raw (--use-raw)")
        require_one_of(self.duplicate_genes, ("error", "first", "sum"), key + "duplicate_genes (--duplicate-genes)")
        if self.remove_duplicate_genes and self.duplicate_genes == "error":
            self.duplicate_genes = "first"
        require_positive(self, key, {"clip_counts (--clip-counts)": MAX_COUNTS})
        require_ranges(self, key, _DATA_RANGES)
        for name in self.esm2_mappings:
            require(is_plain_name(name), key + "esm2_mappings", f"{name!r} is not the name of a file in vocabs/")
        for name in self.aux_cols:
            # It names the vocabulary file and its weights, and config.json holds the names separated by commas.
            is_name = is_plain_name(name) and not set(name) & {".", ","} and name == name.strip()
            require(is_name, key + "aux_cols", f"{name!r} is empty, starts or ends with a blank, or contains . , or /")
        for field_name in ("aux_cols", "special_tokens"):
            names = getattr(self, field_name)
            require(len(set(names)) == len(names), key + field_name, f"names are not unique: {', '.join(names)}")
        require(
            not (self.sort_genes and self.randomize_genes),
            key + "sort_genes",
            "cannot be combined with randomize_genes",
        )


@dataclass
class ModelConfig:
    """Architecture of the trained model (`model.model_config`)."""

    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Attention heads per block."""
    embed_dim: int
    """Embedding width, D."""
    model_dim: int
    """Width of the feed-forward layer."""
    seq_len: int
    """Maximum gene positions per cell, L."""
    aux_len: int = 0
    """Auxiliary tokens before the genes, A."""
    dropout: float = 0.1
    """Dropout of the feed-forward layer and the MLPs during training."""
    activation: str = "gelu"
    """Activation of the feed-forward layer."""
    fw_bias: bool = False
    """Use biases in the feed-forward layer."""
    attn_bias: bool = False
    """Use biases in the attention projections."""
    softcap: float = 10.0
    """Soft cap c of attention scores and gene logits, c · tanh(x / c); 0: no cap."""
    log_counts_eps: float = 1e-6
    """Added to counts before taking the logarithm."""
    mu_link_fn: str = "softmax"
    """Link function from the count head's output to expected counts."""
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
    """Training losses (`model.loss_config`)."""

    gene_id_loss_weight: float = 1.0
    """Weight of the gene cross-entropy; checkpoints trained with 0 have no gene head."""
    softplus_approx: bool = True
    """Compute log(eˣ − 1) of the zero-truncated Poisson as x − softplus(−x)."""

    def __post_init__(self) -> None:
        require_ranges(self, "model.loss_config.", {"gene_id_loss_weight": (0, 1e6)})


PRECISIONS = ("16-mixed", "bf16-mixed", "32")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass
class ComputeConfig:
    """Hardware and precision of a run."""

    precision: str = "16-mixed"
    """32, bf16-mixed or 16-mixed (fp16 on GPUs; bf16 on CPUs with bf16 matrix instructions, else 32)."""
    device: str = "auto"
    """cpu, cuda, mps or auto (the first available of cuda, mps, cpu)."""
    num_gpus: int = 1
    """Number of devices, one process each; -1: all GPUs. On a CPU: number of processes."""
    num_nodes: int = 1
    """Number of machines; start the command on each."""
    resume: bool = False
    """Continue an interrupted run."""

    def require_computable(self, key: str) -> None:
        """Raise UsageError for an invalid value; `key` is the path of the section, ending in a dot."""
        require_one_of(self.precision, PRECISIONS, key + "precision (--precision)")
        require_one_of(self.device, DEVICES, key + "device (--device)")
        require_gpus(self.num_gpus, key)
        require_ranges(self, key, {"num_nodes (--num-nodes)": (1, 2**16)})


@dataclass
class InferenceConfig(ComputeConfig):
    """Settings of `transcriptformer inference` (`model.inference_config`)."""

    batch_size: int | str = "auto"
    """Maximum cells per batch; auto: chosen for the device and its free memory."""
    tokens_per_batch: int | None = None
    """Maximum positions per batch, including padding; None: chosen for the device."""
    attention: str = "auto"
    """blockwise, flex (compiled FlexAttention), plain (slow reference implementation) or auto (flex if it is faster and
    the run long enough, else blockwise)."""
    embedding_layer_index: int = -1
    """Block whose output is the embedding; negative values count from the end."""
    emb_type: str = "cell"
    """cell: one mean embedding per cell; cge: one contextual embedding per gene and cell."""
    cge_pool: str | None = None
    """Average contextual embeddings per gene (`gene`), or per gene and value of an `obs` column; None: no pooling."""
    output_keys: list[str] = field(default_factory=lambda: ["embeddings"])
    """Results to compute: embeddings, llh."""
    predict_labels: bool = True
    """Add predicted labels to `obs` if the checkpoint has a label head; needs cell embeddings."""
    obs_keys: list[str] = field(default_factory=lambda: ["all"])
    """Columns of `obs` to keep in the output, or `all`."""
    make_names_unique: bool = False
    """Append the name of the input, without its suffix, to cell names, and a running number to those that repeat."""
    output_path: str = "./inference_results"
    """Output folder."""
    output_filename: str = "embeddings.h5ad"
    """Output name, ending in .h5ad or .zarr."""
    pretrained_embedding: list[str] = field(default_factory=list)
    """Protein-embedding files of a new species, which replace the checkpoint's genes."""
    reference_stale_indices: bool = False
    """Reproduce the published package's results for a new species, including its stale special-token indices: cells are
    padded to full length and padding is treated as genes."""
    oom_dataloader: bool = True
    """Read counts in blocks on demand instead of loading whole files into memory."""

    def __post_init__(self) -> None:
        key = "model.inference_config."
        require(
            self.batch_size == "auto" or (isinstance(self.batch_size, int) and 0 < self.batch_size <= MAX_INT),
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
            f"{self.output_filename!r} is not a name that ends in .h5ad or .zarr (set the folder with --output-path)",
        )
        require(
            self.cge_pool is None or (self.emb_type == "cge" and self.output_keys == ["embeddings"]),
            key + "cge_pool (--cge-pool)",
            "requires --emb-type cge, and embeddings as the only output key",
        )
        require(
            self.cge_pool is None or not self.make_names_unique,
            key + "make_names_unique (--make-names-unique)",
            "has no effect with --cge-pool, which writes genes; leave it out",
        )
        require(
            not self.reference_stale_indices or len(self.pretrained_embedding) > 0,
            key + "reference_stale_indices",
            "requires --pretrained-embedding",
        )


@dataclass
class TrainedModel:
    """Settings that a checkpoint was trained with (`model`)."""

    model_config: ModelConfig
    data_config: DataConfig = field(default_factory=DataConfig)
    loss_config: LossConfig = field(default_factory=LossConfig)


@dataclass
class ModelSection(TrainedModel):
    """The `model` section: a trained model and the inference settings."""

    inference_config: InferenceConfig = field(default_factory=InferenceConfig)
    model_type: str = "transcriptformer"
    """transcriptformer, or esm2ce: the protein embeddings of a cell's genes, without a transformer."""

    def __post_init__(self) -> None:
        require_one_of(self.model_type, ("transcriptformer", "esm2ce"), "model.model_type (--model-type)")
        require(
            self.model_type == "transcriptformer" or self.inference_config.output_keys == ["embeddings"],
            "model.inference_config.output_keys",
            "must be [embeddings] for esm2ce",
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
        """Serialize all values to JSON."""
        return json.dumps(asdict(self))


def conf_dir() -> Path:
    """Folder of the YAML files with the defaults."""
    return shipped_file("conf/inference_config.yaml").parent


def shipped_file(name: str) -> Path:
    """Path of a file shipped with the package: inside an installation, or next to `src` in a checkout."""
    here = Path(__file__).resolve()
    for folder in (here.parent, here.parents[2]):
        if (folder / name).is_file():
            return folder / name
    raise RuntimeError(f"{name} is missing; reinstall transcriptformer")


def finish_config(config: DictConfig, options: Mapping[str, object], overrides: Sequence[str]) -> object:
    """Apply options, then overrides, to `config` and convert it to a validated dataclass.

    Raises
    ------
    UsageError
        If a key is unknown, or a value has the wrong type or is invalid.
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
    """Parse an override in Hydra's grammar into key and value."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UsageError(
            f"--config-override {override!r}: is not of the form key.path=value ({first_line(error)})"
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
        try:
            items.append(value)
        except OmegaConfBaseException as invalid:
            raise UsageError(f"{key}: {first_line(invalid)}") from invalid
    except (AttributeError, KeyError) as error:  # subclassed by OmegaConf for unknown keys
        values = OmegaConf.to_container(config)
        assert isinstance(values, dict)
        close = difflib.get_close_matches(key, [key for key, _ in leaves(values)], n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"{key}: no such configuration key{hint}") from error
    except (OmegaConfBaseException, ValueError, OverflowError) as error:
        raise UsageError(f"{key}: {first_line(error)}") from error


def leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over nested values and their dotted paths."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def full_key(error: OmegaConfBaseException) -> str:
    """Dotted path of the value that caused an error."""
    return repr(error.full_key)


def first_line(error: Exception) -> str:
    """First line of an error message, at most 300 characters."""
    return str(error).split("\n", maxsplit=1)[0][:300]
