"""Expression-aware causal attention: its mask, its score bias, and the two paths that must agree.

Notation: B cells, H heads, T positions (auxiliary tokens first, then genes), d = D / H.

A score between query i and key j is

    s = qᵢ · kⱼ / √d + log1p(cⱼ + eps)        the bias is left out at i = j while training
    s = softcap · tanh(s / softcap)            if softcap > 0

and a query sees the keys j ≤ i that are allowed at all (neither [PAD] nor an unknown auxiliary token). A query that
sees no key gives 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, bool], Tensor]
"""(q, k, v, key_bias, key_allowed, softcap, bias_on_diagonal) → values of each query (B, H, T, d)."""

SCORE_LIMIT = 1e6
"""Scores are clamped to ± this before the soft cap, so that an overflow stays finite."""

QUERY_BLOCK = 128
"""Queries that `fast_attention` handles at a time."""


def count_bias(counts: Tensor, eps: float) -> Tensor:
    """What a key's count adds to every score it takes part in: log1p(c + eps), (B, T)."""
    return torch.log1p(counts + eps)


def visible_keys(key_allowed: Tensor) -> Tensor:
    """Mask (B, T, T) of the keys each query sees, from which keys are allowed at all (B, T).

    For four positions of which the first is an unknown auxiliary token and the last is [PAD]::

        query ↓ key →   0 1 2 3
                    0   . . . .
                    1   . x . .
                    2   . x x .
                    3   . x x .
    """
    length = key_allowed.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=key_allowed.device).tril()
    return causal & key_allowed[:, None, :]


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    key_allowed: Tensor,
    softcap: float,
    bias_on_diagonal: bool,
) -> Tensor:
    """The definition: all scores at once, in float32, on any device.

    Parameters
    ----------
    q, k, v
        (B, H, T, d)
    key_bias, key_allowed
        (B, T); see `count_bias` and `visible_keys`.
    softcap
        0: scores are not capped.
    bias_on_diagonal
        Whether a query adds the bias to its own key: True for embeddings, False while training.

    Returns
    -------
    (B, H, T, d), in the type of `v`.
    """
    scores = q.float() @ k.float().mT / q.shape[-1] ** 0.5  # (B, H, T, T)
    bias = key_bias.float()[:, None, None, :].expand_as(scores)
    scores = scores + (bias if bias_on_diagonal else bias - torch.diag_embed(torch.diagonal(bias, dim1=-2, dim2=-1)))
    if softcap > 0:
        scores = softcap * torch.tanh(scores.clamp(-SCORE_LIMIT, SCORE_LIMIT) / softcap)
    visible = visible_keys(key_allowed)[:, None]  # (B, 1, T, T)
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    weights = weights.masked_fill(~visible, 0)  # a query without keys: 0 instead of NaN
    return (weights @ v.float()).to(v.dtype)


def fast_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    key_allowed: Tensor,
    softcap: float,
    bias_on_diagonal: bool,
) -> Tensor:
    """The same in blocks of queries: keys behind a block are not computed, and matrix products run in the type of `q`.

    Parameters and result are those of `plain_attention`. It works in place, so it has no gradients.
    """
    batch, heads, length, head_dim = q.shape
    cap = softcap if softcap > 0 else 1.0  # scores are computed as s / cap, which spares a pass over them
    q = (q / (head_dim**0.5 * cap)).contiguous()
    k, v = k.mT.contiguous(), v.contiguous()  # (B, H, d, T), (B, H, T, d)
    bias = key_bias.float()[:, None, None, :] / cap  # (B, 1, 1, T)
    hidden_keys = torch.zeros_like(bias).masked_fill_(~key_allowed[:, None, None, :], -torch.inf)
    output = torch.empty(batch, length, heads, head_dim, dtype=v.dtype, device=v.device)
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        scores = (q[:, :, start:end] @ k[..., :end]).float()  # (B, H, block, end)
        scores += bias[..., :end]
        own_block = scores[..., start:]  # (B, H, block, block)
        if not bias_on_diagonal:
            own_block.diagonal(dim1=-2, dim2=-1).sub_(bias[..., 0, start:end])
        if softcap > 0:
            scores.tanh_().mul_(softcap)
        scores += hidden_keys[..., :end]
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu_(1)
        own_block.masked_fill_(later, -torch.inf)
        weights = torch.softmax(scores, dim=-1).to(v.dtype)
        output[:, start:end] = (weights @ v[:, :, :end]).transpose(1, 2)
    has_key = key_allowed.cumsum(dim=-1) > 0  # (B, T)
    return output.masked_fill_(~has_key[..., None, None], 0).transpose(1, 2)  # (B, H, T, d)


ATTENTION: dict[str, Attention] = {"plain": plain_attention, "fast": fast_attention}
