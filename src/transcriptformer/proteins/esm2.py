"""ESM-2: its weights, its layers up to the wanted one, and the mean of their states over the residues of a protein."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from transcriptformer.errors import CheckpointError, DownloadError, TranscriptFormerError, UsageError, one_line
from transcriptformer.proteins.alphabet import N_TOKENS, PAD, tokenize
from transcriptformer.proteins.fasta import missing_extra
from transcriptformer.runtime.device import compute_dtype
from transcriptformer.runtime.memory import Halving

if TYPE_CHECKING:
    from transformers import EsmConfig, EsmModel

logger = logging.getLogger(__name__)

PUBLISHED = "facebook/esm2_t36_3B_UR50D"
"""The model of the published protein embeddings."""

PUBLISHED_LAYER = {36: 33}
"""Layer of the published protein embeddings, by number of layers; of other models the last one is taken."""

WEIGHTS = (["*.safetensors", "*.safetensors.index.json"], ["*.bin", "*.bin.index.json"])
"""Files of weights, in the two formats there are."""

_MAY_BE_MISSING = ("contact_head.", "rotary_embeddings.", "embeddings.position_")
"""In the names of weights that residue states do not depend on, or that follow from the configuration."""


def find_model(name: str) -> Path:
    """Folder with `config.json` and weights: a local one, or of the Hugging Face hub, from its cache or its server.

    `HF_ENDPOINT` moves the server's address, `HF_HOME` the cache.

    Raises
    ------
    UsageError
        If there is no such folder, or a package is not installed.
    DownloadError
        If it cannot be fetched.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(f"--model {name}: no such folder, and no name on the Hugging Face hub such as {PUBLISHED}")
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        raise missing_extra(error) from error
    try:
        for patterns in WEIGHTS:
            folder = Path(snapshot_download(name, allow_patterns=["config.json", *patterns]))
            if weight_files(folder):
                return folder
    except Exception as error:  # of the hub's package and of those that it fetches with
        raise DownloadError(
            f"--model {name}: no such folder, not in the cache, and cannot be fetched from {constants.ENDPOINT} "
            f"({_cause(error)}); where there is a network, `hf download {name} --local-dir {name.partition('/')[2]}` "
            "makes a folder with config.json and weights (*.safetensors or *.bin); bring it here and name it by --model"
        ) from error
    raise DownloadError(f"--model {name}: {constants.ENDPOINT} has no weights of it (*.safetensors or *.bin)")


def _cause(error: Exception) -> str:
    """What is behind an error of the hub's package, which explains more than a line can hold."""
    cause = error.__cause__
    return one_line(cause if isinstance(cause, Exception) else error)


def weight_files(folder: Path) -> list[Path]:
    """Files of weights in a folder."""
    return sorted(path for patterns in WEIGHTS for path in folder.glob(patterns[0]))


def read_config(folder: Path) -> "EsmConfig":
    """The configuration of an ESM-2.

    Raises
    ------
    CheckpointError
        If the folder has none, of another model, or no weights.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise missing_extra(error) from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its config.json is missing or damaged ({one_line(error)})") from error
    if config.model_type != "esm" or config.position_embedding_type != "rotary" or config.vocab_size != N_TOKENS:
        raise CheckpointError(f"{folder}: not an ESM-2, but a model of type {config.model_type!r}")
    if not weight_files(folder):
        raise CheckpointError(f"{folder}: there are no weights in it (*.safetensors or *.bin)")
    return config


def choose_layer(config: "EsmConfig", layer: int | None) -> int:
    """The wanted layer, counted from 1; None: that of the published embeddings, or the last one.

    Raises
    ------
    UsageError
        If the model does not have it.
    """
    n_layers = config.num_hidden_layers
    if layer is None:
        return PUBLISHED_LAYER.get(n_layers, n_layers)
    if not 1 <= layer <= n_layers:
        raise UsageError(f"--layer {layer}: the model has layers 1 to {n_layers}")
    return layer


class Esm2:
    """ESM-2 without the layers after the wanted one.

    Parameters
    ----------
    folder
        With its configuration and weights.
    layer
        Whose states are taken, counted from 1. The norm at the end of the model belongs to the last one only.
    precision
        As for `inference`: of the matrix products; everything else is float32.

    Raises
    ------
    CheckpointError
        If weights are missing or damaged.
    """

    def __init__(self, folder: Path, layer: int, precision: str, device: torch.device) -> None:
        self.device, self.dtype = device, compute_dtype(precision, device)
        self.model: Any = _load(folder)
        if layer < len(self.model.encoder.layer):
            self.model.encoder.layer = self.model.encoder.layer[:layer]
            self.model.encoder.emb_layer_norm_after = None
        for module in self.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(self.dtype)
        self.model.to(device).eval()
        self.halving = Halving(
            self._residue_means,
            _size,
            _split,
            lambda first, second: np.concatenate([first, second]),
            "protein",
            "use another device, --precision 16-mixed or a smaller --max-length",
        )

    @torch.inference_mode()
    def residue_means(self, sequences: Sequence[str]) -> np.ndarray:
        """Mean of the layer's states over the residues of each protein (proteins, P), float32.

        Proteins that do not fit into memory together are halved, and so are later ones of their size.

        Raises
        ------
        TranscriptFormerError
            If memory does not suffice for one protein.
        """
        return self.halving(sequences)

    def _residue_means(self, sequences: Sequence[str]) -> np.ndarray:
        lengths = torch.tensor([len(residues) for residues in sequences], device=self.device)
        n_tokens = int(lengths.max()) + 2
        rows = [np.pad(row, (0, n_tokens - len(row)), constant_values=PAD) for row in map(tokenize, sequences)]
        tokens = torch.from_numpy(np.stack(rows)).to(self.device)  # (proteins, tokens)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            states = self.model(tokens, attention_mask=(tokens != PAD).long()).last_hidden_state
        position = torch.arange(n_tokens, device=self.device)
        is_residue = (position > 0) & (position <= lengths[:, None])  # (proteins, tokens)
        sums = (states.float() * is_residue[:, :, None]).sum(dim=1)  # (proteins, P)
        means = (sums / lengths[:, None]).cpu().numpy()
        if not np.isfinite(means).all():
            raise TranscriptFormerError(
                f"embeddings of {len(means)} proteins are not all finite: numbers are too large for this precision, or "
                "weights are damaged; --precision 32 reaches furthest"
            )
        return means


def _size(sequences: Sequence[str]) -> tuple[int, int]:
    return len(sequences), len(sequences) * (max(map(len, sequences)) + 2)


def _split(sequences: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    middle = len(sequences) // 2
    return sequences[:middle], sequences[middle:]


def _load(folder: Path) -> "EsmModel":
    from transformers import EsmModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # what it would say is checked here
    transformers_logging.disable_progress_bar()
    try:
        model, found = EsmModel.from_pretrained(
            folder, add_pooling_layer=False, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # of several packages, which depend on how a file is damaged
        raise CheckpointError(f"{folder}: its weights cannot be read ({one_line(error)})") from error
    wrong = [name for name in found["missing_keys"] if not any(part in name for part in _MAY_BE_MISSING)]
    if wrong:
        raise CheckpointError(f"{folder}: its weights lack {wrong[0]} (and {len(wrong) - 1} more)")
    return model.float()
