"""The attention as a kernel that PyTorch's FlexAttention compiles, and the choice between the paths.

The first call waits for the compiler, some ten seconds; shapes are left open, so that it is called a few times at most.
"""

import logging
import shutil
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as flex

from transcriptformer.config import ModelConfig
from transcriptformer.model.attention.blockwise import needs_gradients, trainable_attention
from transcriptformer.model.attention.definition import Attention, blockwise_attention, hiding, plain_attention

logger = logging.getLogger(__name__)

SHORT = 384
"""With fewer positions than this, a CPU is faster in blocks."""

WIDTH_MULTIPLE = 32
"""Head widths are rounded up to this on a CPU, as its matrix instructions would have it."""

HIDING = 10_000
"""The negative of this, as a bias, hides a key: no score comes near it, and its exponential is 0."""

MANY_SCORES = {"cpu": 2**35, "cuda": 2**39}
"""With fewer in a whole run, of all heads and layers, the compiler would take more time than it saves.

On a CPU it was measured: in long cells the kernel saves about a nanosecond per score, and takes some ten seconds.
"""


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, config: ModelConfig, lengths: np.ndarray
) -> Attention:
    """The path of that name; `auto` is flex where it is faster and there is enough to do, elsewhere blockwise.

    On a CPU, flex is faster in half precision, and needs a C++ compiler.

    Parameters
    ----------
    dtype
        Type of the matrix products.
    config
        Of the model.
    lengths
        Genes of each cell of the run (cells,).
    """
    if name != "auto":
        return ATTENTION[name]
    is_faster = device.type == "cuda" or (device.type == "cpu" and dtype == torch.bfloat16 and _has_compiler())
    n_scores = config.num_layers * config.num_heads * np.square(lengths[lengths >= SHORT], dtype=np.float64).sum()
    if not is_faster or n_scores < MANY_SCORES[device.type]:
        return blockwise_attention
    return flex_attention if _compiles(device, dtype, config) else blockwise_attention


def choose_training_attention(name: str, device: torch.device, dtype: torch.dtype, config: ModelConfig) -> Attention:
    """The path of that name, with gradients; `auto` is flex on a GPU where it can be compiled, elsewhere in blocks."""
    if name == "plain":
        return plain_attention
    if name == "flex" or (
        name == "auto" and device.type == "cuda" and _compiles(device, dtype, config, trainable=True)
    ):
        return flex_attention
    return trainable_attention


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++"))


def _compiles(device: torch.device, dtype: torch.dtype, config: ModelConfig, trainable: bool = False) -> bool:
    """Whether the kernel, with gradients if `trainable`, compiles here; tried on few cells, it is ready for all."""
    shape = 2, SHORT, config.num_heads, config.embed_dim // config.num_heads
    q = torch.ones(shape, device=device, dtype=dtype).transpose(1, 2).requires_grad_(trainable)  # (B, H, T, d)
    bias = torch.zeros(2, SHORT, device=device)
    try:
        values = flex_attention(q, q, q, bias, bias == 0, config.softcap, not trainable)
        if trainable:
            values.sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever the compiler's troubles are, the run can do without
        logger.debug("the attention cannot be compiled here, it runs in blocks: %s", error)
        return False
    return True


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    key_allowed: Tensor,
    softcap: float,
    bias_on_diagonal: bool,
) -> Tensor:
    """The same as `plain_attention`, with the same parameters and result."""
    if q.device.type != "cpu":
        return look_bias_up(q, k, v, key_bias, key_allowed, softcap, bias_on_diagonal)
    if not bias_on_diagonal or needs_gradients(q, k, v):  # while training, which on a CPU the kernel is not made for
        return trainable_attention(q, k, v, key_bias, key_allowed, softcap, bias_on_diagonal)
    if q.shape[2] < SHORT or len(q) == 1:  # a single cell would be compiled for apart
        return blockwise_attention(q, k, v, key_bias, key_allowed, softcap, bias_on_diagonal)
    return carry_bias_in_keys(q, k, v, key_bias, key_allowed, softcap)


def look_bias_up(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, key_allowed: Tensor, softcap: float, bias_on_diagonal: bool
) -> Tensor:
    """The kernel reads each key's bias, and whether it is hidden, where it needs them."""
    cap, blocks = _caps(q, softcap), _causal_blocks(q.shape[2], q.device)
    values = _compiled(_look_up)(q, k, v, key_bias.float(), hiding(key_allowed), cap, bias_on_diagonal, blocks)
    return _without_keys_zero(values, key_allowed)


def _look_up(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    hidden: Tensor,
    cap: Tensor | None,
    bias_on_diagonal: bool,
    blocks: BlockMask,
) -> Tensor:
    def modify(score: Tensor, cell: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        bias = key_bias[cell, key]
        score = score + (bias if bias_on_diagonal else torch.where(query == key, 0.0, bias))
        if cap is not None:
            score = cap[cell] * torch.tanh(score / cap[cell])
        return score + hidden[cell, key]

    return flex(q, k, v, score_mod=modify, block_mask=blocks)


def carry_bias_in_keys(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, key_allowed: Tensor, softcap: float
) -> Tensor:
    """The bias rides in columns of the keys: on a CPU the kernel would look it up number by number.

    A hidden key is known by its bias, lower than any score. The scores s come as 2·s / softcap, and softcap·tanh(x / 2)
    is computed as softcap − 2·softcap / (exp(x) + 1), without its first term, which a softmax does not feel: the
    compiler has no fast tanh for CPUs.
    """
    cells, heads, length, head_dim = q.shape
    scale = 2 / softcap if softcap > 0 else 1.0
    width = -(-(head_dim + 2) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    bias = (scale * key_bias.float()).masked_fill_(~key_allowed, -HIDING)[:, None, :, None]  # (B, 1, T, 1)
    coarse = bias.to(q.dtype)
    wide = q.new_empty(2, cells, length, heads, width).transpose(2, 3)  # (2, B, H, T, width)
    wide[..., head_dim + 2 :] = 0
    wide_q, wide_k = wide
    torch.mul(q, scale / head_dim**0.5, out=wide_q[..., :head_dim])
    wide_q[..., head_dim : head_dim + 2] = 1
    wide_k[..., :head_dim] = k
    wide_k[..., head_dim : head_dim + 1] = coarse
    wide_k[..., head_dim + 1 : head_dim + 2] = bias - coarse.float()  # what rounding it has cost
    values = _compiled(_in_keys)(wide_q, wide_k, v, _caps(q, softcap), _causal_blocks(length, q.device))
    return _without_keys_zero(values, key_allowed)


def _in_keys(q: Tensor, k: Tensor, v: Tensor, cap: Tensor | None, blocks: BlockMask) -> Tensor:
    def modify(score: Tensor, cell: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        if cap is None:
            return score
        return torch.where(score < -HIDING // 2, score, -2 * cap[cell] / (torch.exp(score) + 1))

    return flex(q, k, v, score_mod=modify, block_mask=blocks, scale=1.0)


def _without_keys_zero(values: Tensor, key_allowed: Tensor) -> Tensor:
    """Values of the queries (B, H, T, d), in place 0 where no key is seen."""
    has_key = key_allowed.cumsum(dim=-1) > 0  # (B, T)
    return values.masked_fill(~has_key[:, None, :, None], 0)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)  # not at import, for that loads the compiler


def _caps(q: Tensor, softcap: float) -> Tensor | None:
    """The soft cap of each cell (B,), a tensor, for the compiler cannot handle a number; None: there is none."""
    return torch.full((len(q),), softcap, device=q.device) if softcap > 0 else None


@lru_cache(maxsize=128)
def _causal_blocks(length: int, device: torch.device) -> BlockMask:
    """Which blocks of keys the blocks of queries see, and which keys within them."""

    def is_seen(_cell: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(is_seen, None, None, length, length, device=device.type)


ATTENTION: dict[str, Attention] = {
    "plain": plain_attention,
    "blockwise": blockwise_attention,
    "flex": flex_attention,
}
