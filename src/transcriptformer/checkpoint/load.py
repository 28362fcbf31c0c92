"""Loading the vocabularies and the model of a checkpoint folder."""

import hashlib
import itertools
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from transcriptformer.checkpoint.files import file_in
from transcriptformer.checkpoint.vocabs import read_aux_vocab, read_gene_vocab, read_protein_embeddings
from transcriptformer.config import Config, TrainedModel
from transcriptformer.errors import CheckpointError, one_line
from transcriptformer.model.esm2ce import Esm2CE
from transcriptformer.model.label_head import LabelHead
from transcriptformer.model.layers import Linear
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runtime.device import choose_device, compute_dtype
from transcriptformer.storage.file_state import FileState
from transcriptformer.vocab import AuxVocab, GeneVocab, make_gene_vocab

WEIGHTS, LABEL_HEAD = "model_weights.pt", "label_head.pt"
_EMBEDDING = "gene_embeddings.embedding.weight"
_LAYERS = "transformer_encoder.encoder_layers."

MAX_WEIGHT = 1.8e19
"""Largest weight whose square, which layer norms compute, does not overflow float32."""

REFERENCE_SPECIAL_TOKENS = ("unknown", "[START]", "[END]", "[RD]", "[CELL]", "[PAD]", "[MASK]")
"""Order of the special tokens that the published package uses for a new species; its model keeps the old order."""


@lru_cache
def _sha256(path: Path, state: FileState) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        is_same = FileState.of(path) == state
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read any more ({error.strerror})") from error
    if not is_same:
        raise CheckpointError(f"{path}: changed since it was loaded; load it again")
    return digest


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes
    ----------
    path
        Checkpoint folder.
    config
        Configuration of the run.
    gene_vocab, aux_vocabs
        Vocabularies; `aux_vocabs` in the order of the auxiliary tokens.
    model
        Model in evaluation mode and in the run's precision; weights that stay float32 are memory-mapped.
    device
        Device to run on.
    label_head
        Head that predicts cell labels from embeddings, float32, if the checkpoint has one.
    weights_file
        State of `model_weights.pt` when it was loaded.
    """

    path: Path
    config: Config
    gene_vocab: GeneVocab
    aux_vocabs: dict[str, AuxVocab]
    model: TranscriptFormer | Esm2CE
    device: torch.device
    label_head: LabelHead | None
    weights_file: FileState

    @property
    def min_positions(self) -> int:
        """Minimum padded length of a cell: 0, or `seq_len` to reproduce the published package's stale indices."""
        model = self.config.model
        return model.model_config.seq_len if model.inference_config.reference_stale_indices else 0

    @property
    def width(self) -> int:
        """Embedding width."""
        return self.model.embedding.shape[1] if isinstance(self.model, Esm2CE) else self.model.config.embed_dim

    @property
    def weights_bytes(self) -> int:
        """Size of the weights in memory."""
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters())

    def weights_sha256(self) -> str:
        """Return the SHA-256 of `model_weights.pt`, as `sha256sum` prints it; computed once per file.

        Raises
        ------
        CheckpointError
            If the file has changed since it was loaded, or is gone.
        """
        return _sha256(self.path / WEIGHTS, self.weights_file)

    def identify_vocabularies(self) -> dict[str, str]:
        """Return hashes of the gene and metadata vocabularies and, if there is one, of the label head's file."""
        values = {"genes": self.gene_vocab.names().tolist(), "metadata": {c: v.ids for c, v in self.aux_vocabs.items()}}
        hashes = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in values.items()}
        if self.label_head is not None:
            hashes["label head"] = hashlib.sha256((self.path / LABEL_HEAD).read_bytes()).hexdigest()
        return hashes


def load_checkpoint(path: Path, config: Config) -> Checkpoint:
    """Read the vocabularies and weights and build the model.

    The weights are memory-mapped, not copied, and must match the model by name and shape. `config` sets the device, the
    precision and the protein embeddings of a new species.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, or the weights do not match `config.json`.
    """
    inference = config.model.inference_config
    device = choose_device(inference.device)
    trained_vocab, aux_vocabs = read_vocabs(path, config.model)
    weights_path = path / WEIGHTS
    weights = read_weights(weights_path)
    weights_file = FileState.of(weights_path)
    _check_embedding(weights, len(trained_vocab), weights_path)
    check_values(weights_path)
    gene_vocab, embedding = trained_vocab, weights[_EMBEDDING]
    if inference.pretrained_embedding:
        gene_vocab, embedding = _new_species(config, trained_vocab, embedding)

    model: TranscriptFormer | Esm2CE
    if config.model.model_type == "esm2ce":
        model = Esm2CE(embedding, gene_vocab.pad, config.model.model_config.seq_len)
    else:
        model = new_model(config.model, trained_vocab, aux_vocabs, weights, weights_path)
        model.load_state_dict(weights, assign=True)
        dtype = compute_dtype(inference.precision, device)
        if dtype != torch.float32:
            _cast_linear_layers(model, weights_path, dtype)
        if inference.pretrained_embedding:
            model.replace_genes(embedding)
    model.eval().requires_grad_(False)
    return Checkpoint(path, config, gene_vocab, aux_vocabs, model, device, _label_head(path, config), weights_file)


def new_model(
    config: TrainedModel,
    gene_vocab: GeneVocab,
    aux_vocabs: Mapping[str, AuxVocab],
    weights: Mapping[str, Tensor],
    path: Path,
) -> TranscriptFormer:
    """Build a model on the meta device, to be filled with `weights`, which were read from `path`.

    Raises
    ------
    CheckpointError
        If the weights do not match the model.
    """
    protein_dim = _check_embedding(weights, len(gene_vocab), path)
    n_layers = len({name.split(".")[2] for name in weights if name.startswith(_LAYERS)})
    if n_layers != config.model_config.num_layers:
        raise CheckpointError(
            f"{path}: does not match config.json: it has {n_layers} layers, but num_layers is "
            f"{config.model_config.num_layers}"
        )
    with torch.device("meta"), _WithoutInit():
        model = TranscriptFormer(config.model_config, config.loss_config, gene_vocab, aux_vocabs, protein_dim)
    check_weights(weights, model.state_dict(), path)
    return model


class _WithoutInit(TorchFunctionMode):
    """Skip the initialization of weights, which on the meta device imports PyTorch's compiler, in a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _label_head(path: Path, config: Config) -> LabelHead | None:
    """Read the label head if labels are to be predicted and the run computes what it needs: last-layer embeddings."""
    model, inference = config.model, config.model.inference_config
    is_last = inference.embedding_layer_index in (-1, model.model_config.num_layers - 1)
    is_as_trained = model.model_type == "transcriptformer" and inference.emb_type == "cell" and is_last
    if not (inference.predict_labels and is_as_trained):
        return None
    return read_label_head(path, model.model_config.embed_dim)


def read_label_head(path: Path, embed_dim: int) -> LabelHead | None:
    """Read `label_head.pt` from a checkpoint folder, if there is one.

    Raises
    ------
    CheckpointError
        If it is damaged or expects embeddings of another width.
    """
    file = path / LABEL_HEAD
    if not file.exists():
        return None
    try:
        head = LabelHead.from_file(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # on a damaged file, torch.load may raise anything
        raise CheckpointError(f"{file}: damaged or not a label head ({one_line(error)})") from error
    width = head.linear.weight.shape[1]
    if width != embed_dim:
        raise CheckpointError(f"{file}: expects embeddings of width {width}, but the checkpoint's have {embed_dim}")
    return head.eval().requires_grad_(False)


def _new_species(config: Config, trained: GeneVocab, embedding: Tensor) -> tuple[GeneVocab, Tensor]:
    """Return the vocabulary and protein embeddings of a new species; special tokens keep their trained embeddings."""
    inference = config.model.inference_config
    files = [Path(file) for file in inference.pretrained_embedding]
    genes, rows = read_protein_embeddings(files, config.model.data_config.allow_external_links)
    if rows.shape[1] != embedding.shape[1]:
        raise CheckpointError(
            f"{', '.join(map(str, files))}: embeddings have width {rows.shape[1]}, but the checkpoint was trained with "
            f"{embedding.shape[1]}; use the same protein language model"
        )
    special = REFERENCE_SPECIAL_TOKENS if inference.reference_stale_indices else trained.special_tokens
    trained_rows = [trained.special_token(name) for name in special]
    vocab = make_gene_vocab(genes, special, trained.pad_token)
    return vocab, torch.cat([embedding[trained_rows], torch.from_numpy(rows)])


def read_vocabs(path: Path, config: TrainedModel) -> tuple[GeneVocab, dict[str, AuxVocab]]:
    """Read the vocabularies that a checkpoint was trained with.

    Raises
    ------
    CheckpointError
        If one is missing or damaged.
    """
    data, folder = config.data_config, path / "vocabs"
    if not data.esm2_mappings:
        raise CheckpointError(f"{path / 'config.json'}: the required key 'model.data_config.esm2_mappings' is missing")
    if len(data.aux_cols) != config.model_config.aux_len:
        raise CheckpointError(
            f"{path / 'config.json'}: aux_len is {config.model_config.aux_len}, but aux_cols has "
            f"{len(data.aux_cols)} columns ({', '.join(data.aux_cols) or 'none'})"
        )
    external = data.allow_external_links
    gene_files = [file_in(folder, name, external) for name in data.esm2_mappings]
    genes = read_gene_vocab(gene_files, data.special_tokens, data.gene_pad_token, external)
    aux_files = {column: file_in(folder, f"{column}_vocab.json", external) for column in data.aux_cols}
    return genes, {column: read_aux_vocab(file, column, data.aux_pad_token) for column, file in aux_files.items()}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of `model_weights.pt`, float32, memory-mapped, without executing pickled code."""
    return {name: value.float() for name, value in _map_weights(path).items()}


def check_values(path: Path) -> None:
    """Raise CheckpointError if a weight is NaN, infinite or larger than `MAX_WEIGHT`.

    Reads the whole file, at about 1 GB/s.
    """
    for _, names in itertools.groupby(_map_weights(path), key=_part_of):
        weights = _map_weights(path)  # a new mapping per part, so that only one part stays in memory
        for name in names:
            if weights[name].numel() == 0:
                continue
            smallest, largest = map(float, weights[name].aminmax())  # both NaN if any value is
            if not -MAX_WEIGHT <= smallest <= largest <= MAX_WEIGHT:
                raise CheckpointError(
                    f"{path}: {name} has values from {smallest:g} to {largest:g}, beyond ±{MAX_WEIGHT:g}; "
                    "the file is damaged or training diverged"
                )


def _part_of(name: str) -> list[str]:
    return name.split(".")[:3]


def _map_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    try:
        weights: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: damaged, or contains pickled code, which is never executed; only tensors are loaded"
        ) from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: not enough memory to map it") from error
    except Exception as error:  # on a damaged file, torch.load may raise anything
        if isinstance(error, OSError) and error.errno is not None:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        raise CheckpointError(f"{path}: truncated, damaged, or not in the zip format of torch.save") from error
    if not isinstance(weights, dict) or not all(_is_weight(name, value) for name, value in weights.items()):
        raise CheckpointError(f"{path}: not a state dict (names → dense floating-point tensors)")
    return weights


def _is_weight(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()  # not an expanded view
    )


def _cast_linear_layers(model: TranscriptFormer, path: Path, dtype: torch.dtype) -> None:
    """Cast the weights of linear layers to `dtype`, so that matrix products run in it.

    Each part of the model is read through its own mapping, so that pages already read do not stay in memory next to the
    cast weights. The gene head is not needed for embeddings and stays float32.
    """
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Linear) and not name.startswith("gene_id_head")
    ]
    for _, part in itertools.groupby(linear, key=lambda item: _part_of(item[0])):
        weights = read_weights(path)
        for name, module in part:
            for kind, _ in list(module.named_parameters()):
                weight = weights[f"{name}.{kind}"].to(dtype)
                if not weight.isfinite().all():
                    raise CheckpointError(
                        f"{path}: {name}.{kind} has values beyond {torch.finfo(dtype).max:g}, the maximum of {dtype}; "
                        "add --precision 32"
                    )
                setattr(module, kind, torch.nn.Parameter(weight))


def _check_embedding(weights: Mapping[str, Tensor], n_genes: int, path: Path) -> int:
    """Check that the protein embeddings have a row per token, and return their width."""
    embedding = weights.get(_EMBEDDING)
    if embedding is None or embedding.ndim != 2 or len(embedding) != n_genes:
        found = "is missing" if embedding is None else f"has shape {tuple(embedding.shape)}"
        raise CheckpointError(
            f"{path}: does not match config.json and vocabs/: {_EMBEDDING} {found}; expected {n_genes} rows"
        )
    return embedding.shape[1]


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError if the names or shapes of weights differ from the expected ones."""
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "wrong shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    found = [f"{kind}: {_shorten(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{path}: does not match config.json and vocabs/: {'; '.join(found)}")


def _shorten(names: list[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
