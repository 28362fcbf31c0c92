"""Choice of the attention implementation."""

import logging
import shutil
from collections.abc import Mapping

import numpy as np
import torch

from transcriptformer.config import ModelConfig
from transcriptformer.model.attention.blockwise import blockwise_attention
from transcriptformer.model.attention.definition import Attention, ScoreMod, plain_attention
from transcriptformer.model.attention.flex import MIN_LENGTH, flex_attention
from transcriptformer.runtime.device import cpu_capabilities

logger = logging.getLogger(__name__)

ATTENTION: dict[str, Attention] = {
    "plain": plain_attention,
    "blockwise": blockwise_attention,
    "flex": flex_attention,
}

MIN_SCORES = {"cpu": 2**35, "cuda": 2**39}
"""Number of scores of a run, over all heads and layers, below which compiling takes longer than the kernel saves.

Measured on a CPU with AMX: compiling takes about ten seconds and saves about a nanosecond per score of long cells.
"""


def choose_attention(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    config: ModelConfig,
    lengths: np.ndarray | None = None,
    capabilities: Mapping[str, object] | None = None,
) -> Attention:
    """Return the named implementation; `auto`: flex if it is faster, compiles and the run is long, else blockwise.

    On a CPU, flex is faster only in bfloat16 with AMX instructions.

    Parameters
    ----------
    dtype
        Dtype of matrix products.
    config
        Architecture of the model.
    lengths
        Number of genes of each cell of the run (cells,); None: a training run, which is long and needs gradients.
    capabilities
        CPU features by name; None: query PyTorch.
    """
    if name != "auto":
        return ATTENTION[name]
    is_training = lengths is None
    is_faster = device.type == "cuda"
    if device.type == "cpu" and dtype == torch.bfloat16 and not is_training and _has_compiler():
        is_faster = bool((cpu_capabilities() if capabilities is None else capabilities).get("amx_bf16"))
    if not is_faster:
        return blockwise_attention
    if lengths is not None:
        lengths = np.minimum(lengths, config.seq_len)
        n_scores = config.num_layers * config.num_heads * np.square(lengths[lengths >= MIN_LENGTH], dtype=float).sum()
        if n_scores < MIN_SCORES[device.type]:
            return blockwise_attention
    return flex_attention if compiles(device, dtype, config, is_training) else blockwise_attention


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++"))


def compiles(device: torch.device, dtype: torch.dtype, config: ModelConfig, trains: bool) -> bool:
    """Whether the kernel compiles on this machine, with gradients if `trains`; the result is reused for all shapes."""
    shape = 2, MIN_LENGTH, config.num_heads, config.embed_dim // config.num_heads
    q = torch.ones(shape, device=device, dtype=dtype).transpose(1, 2).requires_grad_(trains)  # (B, H, T, d)
    bias = torch.zeros(2, MIN_LENGTH, device=device)
    try:
        values = flex_attention(q, q, q, ScoreMod(bias, bias == 0, config.softcap, bias_on_diagonal=not trains))
        if trains:
            values.sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # the compiler may raise anything, and blockwise attention does not need it
        logger.debug("cannot compile flex attention, using blockwise: %s", error)
        return False
    return True
