"""A checkpoint folder becomes vocabularies and a model."""

import hashlib
import itertools
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcriptformer.config import Config
from transcriptformer.device import choose_device, compute_dtype
from transcriptformer.errors import CheckpointError
from transcriptformer.model.attention import ATTENTION
from transcriptformer.model.layers import Linear
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.vocab import AuxVocab, GeneVocab, read_aux_vocab, read_gene_vocab

_EMBEDDING = "gene_embeddings.embedding.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, ready to run.

    Attributes
    ----------
    path
        Its folder.
    gene_vocab, aux_vocabs
        Its vocabularies; `aux_vocabs` in the order of the auxiliary tokens.
    model
        The model in evaluation mode, in the run's precision; what stays float32 is mapped from the file.
    device
        Where it is to run.
    """

    path: Path
    gene_vocab: GeneVocab
    aux_vocabs: dict[str, AuxVocab]
    model: TranscriptFormer
    device: torch.device

    def weights_sha256(self) -> str:
        """SHA-256 of `model_weights.pt`, as `sha256sum` prints it."""
        with (self.path / "model_weights.pt").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(path: Path, config: Config) -> Checkpoint:
    """Read vocabularies and weights and build the model around them.

    The weights are mapped into memory, not copied, and checked strictly by name and shape. `config` says which device
    and precision they are meant for.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, or the weights do not fit `config.json`.
    """
    inference = config.model.inference_config
    device = choose_device(inference.device)
    gene_vocab, aux_vocabs = _read_vocabs(path, config)
    weights_path = path / "model_weights.pt"
    weights = _read_weights(weights_path)
    # Where the embedding is missing or odd, any width will do: it is reported below.
    protein_dim = weights[_EMBEDDING].shape[-1] if _EMBEDDING in weights and weights[_EMBEDDING].ndim == 2 else 1
    with torch.device("meta"):
        model = TranscriptFormer(
            config.model.model_config, config.model.loss_config, gene_vocab, aux_vocabs, protein_dim
        )
    _check_weights(weights, model.state_dict(), weights_path)
    model.load_state_dict(weights, assign=True)
    model.transformer_encoder.attention = ATTENTION[inference.attention]
    dtype = compute_dtype(inference.precision, device)
    if dtype != torch.float32:
        _cast_linear_layers(model, weights_path, dtype)
    return Checkpoint(path, gene_vocab, aux_vocabs, model.eval().requires_grad_(False), device)


def _read_vocabs(path: Path, config: Config) -> tuple[GeneVocab, dict[str, AuxVocab]]:
    data, folder = config.model.data_config, path / "vocabs"
    if not data.esm2_mappings:
        raise CheckpointError(f"{path / 'config.json'}: the needed key 'model.data_config.esm2_mappings' is missing")
    if len(data.aux_cols) != config.model.model_config.aux_len:
        raise CheckpointError(
            f"{path / 'config.json'}: aux_len is {config.model.model_config.aux_len}, but aux_cols names "
            f"{len(data.aux_cols)} columns ({', '.join(data.aux_cols) or 'none'})"
        )
    genes = read_gene_vocab([folder / name for name in data.esm2_mappings], data.special_tokens, data.gene_pad_token)
    aux = {c: read_aux_vocab(folder / f"{c}_vocab.json", c, data.aux_pad_token) for c in data.aux_cols}
    return genes, aux


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of `model_weights.pt`, memory-mapped; nothing in it is executed."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    try:
        weights: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: damaged, or holds pickled code, which is not run; only tensors are read"
        ) from error
    except Exception as error:  # the reader raises whatever a damaged file leads it to
        raise CheckpointError(f"{path}: truncated, damaged, or not in the zip format of torch.save") from error
    if not isinstance(weights, dict) or not all(_is_weight(name, value) for name, value in weights.items()):
        raise CheckpointError(f"{path}: not a state dict (names → dense floating-point tensors)")
    return {name: value.float() for name, value in weights.items()}


def _is_weight(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _cast_linear_layers(model: TranscriptFormer, path: Path, dtype: torch.dtype) -> None:
    """Cast the weights of linear layers, once, so that their products run in `dtype`.

    Each part of the model is read through a mapping of its own, which goes when the part is done: the pages that were
    read do not stay in memory beside what became of them. The gene head, which no embedding needs, is left as it is.
    """
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Linear) and not name.startswith("gene_id_head")
    ]
    for _, part in itertools.groupby(linear, key=lambda item: item[0].split(".")[:3]):
        weights = _read_weights(path)
        for name, module in part:
            for kind, _ in list(module.named_parameters()):
                setattr(module, kind, torch.nn.Parameter(weights[f"{name}.{kind}"].to(dtype)))


def _check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{path}: does not fit config.json and vocabs/: {'; '.join(found)}")


def _some(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
