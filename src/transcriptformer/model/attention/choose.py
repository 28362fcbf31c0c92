"""The choice of a path of the attention."""

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
"""Scores of a whole run, of all heads and layers, below which the compiler takes more time than the kernel saves.

Measured on a CPU with AMX: in long cells the kernel saves about a nanosecond per score, and takes some ten seconds.
"""


def choose_attention(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    config: ModelConfig,
    lengths: np.ndarray | None = None,
    capabilities: Mapping[str, object] | None = None,
) -> Attention:
    """The path of that name; `auto` is flex where it is faster, compiles, and the run is long enough, else blockwise.

    On a CPU, flex is faster in bfloat16 with AMX, which has matrix instructions for it.

    Parameters
    ----------
    dtype
        Type of the matrix products.
    config
        Architecture of the model.
    lengths
        Genes of each cell of the run (cells,); None: a training run, which is long enough and needs gradients.
    capabilities
        What the CPU can do, by name; None: ask PyTorch.
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
        n_scores = config.num_layers * config.num_heads * np.square(lengths[lengths >= MIN_LENGTH], dtype=float).sum()
        if n_scores < MIN_SCORES[device.type]:
            return blockwise_attention
    return flex_attention if compiles(device, dtype, config, is_training) else blockwise_attention


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++"))


def compiles(device: torch.device, dtype: torch.dtype, config: ModelConfig, trains: bool) -> bool:
    """Whether the kernel compiles here, with gradients if the model trains; the trial compiles it for all shapes."""
    shape = 2, MIN_LENGTH, config.num_heads, config.embed_dim // config.num_heads
    q = torch.ones(shape, device=device, dtype=dtype).transpose(1, 2).requires_grad_(trains)  # (B, H, T, d)
    bias = torch.zeros(2, MIN_LENGTH, device=device)
    try:
        values = flex_attention(q, q, q, ScoreMod(bias, bias == 0, config.softcap, bias_on_diagonal=not trains))
        if trains:
            values.sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever the compiler's troubles are, the run can do without
        logger.debug("the attention cannot be compiled here; it runs blockwise: %s", error)
        return False
    return True
