"""ESM-2 truncated after one layer, whose hidden states are averaged over the residues of each protein."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from transcriptformer.errors import CheckpointError, DownloadError, TranscriptFormerError, UsageError, one_line
from transcriptformer.proteins.alphabet import N_TOKENS, PAD, tokenize
from transcriptformer.runtime.device import compute_dtype
from transcriptformer.runtime.memory import Halving

if TYPE_CHECKING:
    from transformers import EsmConfig, EsmModel

logger = logging.getLogger(__name__)

PUBLISHED = "facebook/esm2_t36_3B_UR50D"
"""The model of the published protein embeddings."""

PUBLISHED_LAYER = {36: 33}
"""Layer of the published protein embeddings, by depth of the model; other models default to the last layer."""

WEIGHTS = (["*.safetensors", "*.safetensors.index.json"], ["*.bin", "*.bin.index.json"])
"""File name patterns of weights, in the two supported formats."""

_OPTIONAL_WEIGHTS = ("contact_head.", "rotary_embeddings.", "embeddings.position_")
"""Parts of the names of weights that the hidden states do not depend on, or that the configuration determines."""


def find_model(name: str) -> Path:
    """Return the folder with `config.json` and weights: a local one, or one from the Hugging Face hub or its cache.

    `HF_ENDPOINT` sets the server's address, `HF_HOME` the cache folder.

    Raises
    ------
    UsageError
        If the folder does not exist, or a package is not installed.
    DownloadError
        If the model cannot be downloaded.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(f"--model {name}: no such folder, and not a Hugging Face model name such as {PUBLISHED}")
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        raise _missing_extra(error) from error
    try:
        for patterns in WEIGHTS:
            folder = Path(snapshot_download(name, allow_patterns=["config.json", *patterns]))
            if weight_files(folder):
                return folder
    except Exception as error:  # from huggingface_hub or its HTTP client
        raise DownloadError(
            f"--model {name}: no such folder, not in the cache, and cannot be downloaded from {constants.ENDPOINT} "
            f"({_cause(error)}); on a machine with a network, run `hf download {name} --local-dir "
            f"{name.partition('/')[2]}`, copy that folder (config.json and *.safetensors or *.bin) here and pass it "
            "to --model"
        ) from error
    raise DownloadError(f"--model {name}: no weights (*.safetensors or *.bin) on {constants.ENDPOINT}")


def _missing_extra(error: ImportError) -> UsageError:
    """Describe a missing package of the extra `proteins`."""
    return UsageError(
        f"protein embeddings need a package that is not installed ({one_line(error)}); "
        'run: pip install "transcriptformer[proteins]"'
    )


def _cause(error: Exception) -> str:
    """Describe the cause of an error from the hub, whose own message spans several lines."""
    cause = error.__cause__
    return one_line(cause if isinstance(cause, Exception) else error)


def weight_files(folder: Path) -> list[Path]:
    """List the weight files in a folder."""
    return sorted(path for patterns in WEIGHTS for path in folder.glob(patterns[0]))


def read_config(folder: Path) -> "EsmConfig":
    """Read the configuration of an ESM-2 model.

    Raises
    ------
    CheckpointError
        If the configuration is missing, damaged or of another model, or there are no weights.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise _missing_extra(error) from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: config.json is missing or damaged ({one_line(error)})") from error
    if config.model_type != "esm" or config.position_embedding_type != "rotary" or config.vocab_size != N_TOKENS:
        raise CheckpointError(f"{folder}: not an ESM-2 model, but of type {config.model_type!r}")
    if not weight_files(folder):
        raise CheckpointError(f"{folder}: no weights (*.safetensors or *.bin)")
    return config


def choose_layer(config: "EsmConfig", layer: int | None) -> int:
    """Return the layer to use, counted from 1; by default that of the published embeddings, or the last one.

    Raises
    ------
    UsageError
        If the model has no such layer.
    """
    n_layers = config.num_hidden_layers
    if layer is None:
        return PUBLISHED_LAYER.get(n_layers, n_layers)
    if not 1 <= layer <= n_layers:
        raise UsageError(f"--layer {layer}: the model has layers 1 to {n_layers}")
    return layer


class Esm2:
    """ESM-2, truncated after one layer.

    Parameters
    ----------
    folder
        Folder with the configuration and the weights.
    layer
        Layer whose hidden states are used, counted from 1. The final norm applies to the last layer only.
    precision
        Precision of the matrix products, as for `inference`; everything else is float32.

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
        """Average the layer's hidden states over the residues of each protein (proteins, P), float32.

        A batch that does not fit into memory is halved, and so are later batches of its size.

        Raises
        ------
        TranscriptFormerError
            If a single protein does not fit into memory.
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
        n_bad = int((~np.isfinite(means)).any(axis=1).sum())
        if n_bad:
            raise TranscriptFormerError(
                f"embeddings of {n_bad} proteins are NaN or infinite: values overflow at this precision, or the "
                "weights are damaged; try --precision 32"
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

    transformers_logging.set_verbosity_error()  # missing weights are checked below
    transformers_logging.disable_progress_bar()
    try:
        model, found = EsmModel.from_pretrained(
            folder, add_pooling_layer=False, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # the type depends on the damage
        raise CheckpointError(f"{folder}: cannot read the weights ({one_line(error)})") from error
    missing = [name for name in found["missing_keys"] if not any(part in name for part in _OPTIONAL_WEIGHTS)]
    if missing:
        raise CheckpointError(f"{folder}: missing weights: {missing[0]} (and {len(missing) - 1} more)")
    return model.float()
