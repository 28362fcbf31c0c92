"""Attention as a kernel compiled by PyTorch's FlexAttention.

The first call takes about ten seconds to compile; shapes are dynamic, so later calls rarely recompile.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as flex

from transcriptformer.model.attention.blockwise import blockwise_attention, needs_gradients
from transcriptformer.model.attention.definition import ScoreMod

MIN_LENGTH = 384
"""Minimum number of positions for which the kernel is faster than `blockwise_attention` on a CPU."""

WIDTH_MULTIPLE = 32
"""Head widths are padded to a multiple of this on a CPU, for its matrix instructions."""

MASKED = 10_000
"""A bias of −MASKED masks a key: it is below any score, and its exponential is 0."""


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mod: ScoreMod) -> Tensor:
    """Compute `plain_attention` with a compiled kernel; on a CPU blockwise where that is faster or needs gradients."""
    if q.device.type != "cpu":
        return look_up_bias(q, k, v, mod)
    is_training = not mod.bias_on_diagonal or needs_gradients(q, k, v)
    if is_training or q.shape[2] < MIN_LENGTH or len(q) == 1:  # a single cell would be compiled separately
        return blockwise_attention(q, k, v, mod)
    return carry_bias_in_keys(q, k, v, mod)


def look_up_bias(q: Tensor, k: Tensor, v: Tensor, mod: ScoreMod) -> Tensor:
    """Run the GPU kernel, which looks up the bias and mask of each key in the score function."""
    cap, blocks = _caps(q, mod.softcap), _causal_blocks(q.shape[2], q.device)
    values = _compiled(_kernel)(q, k, v, mod.key_bias.float(), mod.key_mask, cap, mod.bias_on_diagonal, blocks)
    return _zero_without_keys(values, mod.key_allowed)


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    key_mask: Tensor,
    cap: Tensor | None,
    bias_on_diagonal: bool,
    blocks: BlockMask,
) -> Tensor:
    def modify(score: Tensor, cell: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        bias = key_bias[cell, key]
        score = score + (bias if bias_on_diagonal else torch.where(query == key, 0.0, bias))
        if cap is not None:
            score = cap[cell] * torch.tanh(score / cap[cell])
        return score + key_mask[cell, key]

    return flex(q, k, v, score_mod=modify, block_mask=blocks)


def carry_bias_in_keys(q: Tensor, k: Tensor, v: Tensor, mod: ScoreMod) -> Tensor:
    """Run the CPU kernel, whose keys carry the bias in extra columns, because look-ups are not vectorized there.

    The bias of a masked key is below any score. Scores s are computed as x = 2·s / softcap, and softcap·tanh(x / 2) =
    softcap − 2·softcap / (exp(x) + 1) without the first term, to which the softmax is invariant: the compiler has no
    fast tanh for CPUs.
    """
    cells, heads, length, head_dim = q.shape
    scale = 2 / mod.softcap if mod.softcap > 0 else 1.0
    width = -(-(head_dim + 2) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    bias = (scale * mod.key_bias.float()).masked_fill_(~mod.key_allowed, -MASKED)[:, None, :, None]  # (B, 1, T, 1)
    coarse = bias.to(q.dtype)
    wide = q.new_empty(2, cells, length, heads, width).transpose(2, 3)  # (2, B, H, T, width)
    wide[..., head_dim + 2 :] = 0
    wide_q, wide_k = wide
    torch.mul(q, scale / head_dim**0.5, out=wide_q[..., :head_dim])
    wide_q[..., head_dim : head_dim + 2] = 1
    wide_k[..., :head_dim] = k
    wide_k[..., head_dim : head_dim + 1] = coarse
    wide_k[..., head_dim + 1 : head_dim + 2] = bias - coarse.float()  # the rounding error
    values = _compiled(_kernel_in_keys)(wide_q, wide_k, v, _caps(q, mod.softcap), _causal_blocks(length, q.device))
    return _zero_without_keys(values, mod.key_allowed)


def _kernel_in_keys(q: Tensor, k: Tensor, v: Tensor, cap: Tensor | None, blocks: BlockMask) -> Tensor:
    def modify(score: Tensor, cell: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        if cap is None:
            return score
        return torch.where(score < -MASKED // 2, score, -2 * cap[cell] / (torch.exp(score) + 1))

    return flex(q, k, v, score_mod=modify, block_mask=blocks, scale=1.0)


def _zero_without_keys(values: Tensor, key_allowed: Tensor) -> Tensor:
    """Set the values (B, H, T, d) of queries that see no key to 0."""
    has_key = key_allowed.cumsum(dim=-1) > 0  # (B, T)
    return values.masked_fill(~has_key[:, None, :, None], 0)


def _caps(q: Tensor, softcap: float) -> Tensor | None:
    """Return the soft cap of each cell as a tensor (B,), because the compiler cannot handle a float; None: no cap."""
    return torch.full((len(q),), softcap, device=q.device) if softcap > 0 else None


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)  # not at import, which would load the compiler


@lru_cache(maxsize=128)
def _causal_blocks(length: int, device: torch.device) -> BlockMask:
    """Return the causal block mask."""

    def is_seen(_cell: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(is_seen, None, None, length, length, device=device.type)
