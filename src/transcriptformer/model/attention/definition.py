"""Expression-aware causal attention: its mask, its score bias, its definition, and the same in blocks.

`transcriptformer.model.attention.flex` is a third path, which PyTorch compiles. All of them must agree.

Notation: B cells, H heads, T positions (auxiliary tokens first, then genes), d = D / H.

A score between query i and key j is

    s = qᵢ · kⱼ / √d + log1p(cⱼ + eps)        the bias is left out at i = j while training
    s = softcap · tanh(s / softcap)            if softcap > 0

and a query sees the keys j ≤ i that are allowed at all (neither [PAD] nor an unknown auxiliary token). A query that
sees no key gives 0.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, bool], Tensor]
"""(q, k, v, key_bias, key_allowed, softcap, bias_on_diagonal) → values of each query (B, H, T, d)."""

SCORE_LIMIT = 1e6
"""Scores are clamped to ± this before the soft cap, so that an overflow stays finite."""

LEAST_TOTAL = 1e-30
"""Stands for the sum of no weights at all, by which they are divided."""

QUERY_BLOCK = 256
"""Queries that `blockwise_attention` handles at a time."""

SCORES_AT_ONCE = {"cpu": 2**21, "mps": 2**25, "cuda": 2**27}
"""And how many scores, by device, unless those of one block of one head are more."""


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


def hiding(key_allowed: Tensor) -> Tensor:
    """What is added to the capped scores of each key: −∞ where it is not allowed, else 0; (B, T), float32."""
    return torch.zeros_like(key_allowed, dtype=torch.float32).masked_fill_(~key_allowed, -torch.inf)


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


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    key_allowed: Tensor,
    softcap: float,
    bias_on_diagonal: bool,
) -> Tensor:
    """The same in blocks whose scores stay in the cache; keys behind a block are left out.

    Parameters and result are those of `plain_attention`; matrix products run in the type of `q`. It works in place, so
    it has no gradients; `transcriptformer.model.attention.blockwise` adds them.
    """
    cells, heads, length, head_dim = q.shape
    cap = softcap if softcap > 0 else 1.0  # scores are computed as s / cap, which spares a pass over them
    q = (q / (head_dim**0.5 * cap)).flatten(0, 1)  # (B·H, T, d)
    k = k.contiguous().mT.contiguous().flatten(0, 1)  # (B·H, d, T); in two steps, each of which is a fast copy
    v = v.contiguous().flatten(0, 1)  # (B·H, T, d)
    bias = per_head(key_bias.float() / cap, heads)  # (B·H, 1, T)
    hidden = per_head(hiding(key_allowed), heads)  # (B·H, 1, T)
    output = torch.empty_like(v)
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        for few in slices(cells * heads, SCORES_AT_ONCE[q.device.type] // ((end - start) * end)):
            scores = torch.bmm(q[few, start:end], k[few, :, :end]).float()  # (few, block, end)
            own_block = scores[..., start:]  # (few, block, block)
            scores += bias[few, :, :end]
            if not bias_on_diagonal:
                own_block.diagonal(dim1=-2, dim2=-1).sub_(bias[few, 0, start:end])
            if softcap > 0:
                # Capped scores cannot overflow: no maximum has to be taken off, and what comes later can go afterwards.
                scores.tanh_()
                torch.add(hidden[few, :, :end], scores, alpha=cap, out=scores)
            else:
                scores += hidden[few, :, :end]
                own_block.masked_fill_(torch.ones_like(own_block[0], dtype=torch.bool).triu_(1), -torch.inf)
                scores -= scores.amax(-1, keepdim=True).clamp_(min=-SCORE_LIMIT)
            weights = scores.exp_()
            own_block.tril_()
            weights /= weights.sum(-1, keepdim=True).clamp_(min=LEAST_TOTAL)
            output[few, start:end] = torch.bmm(weights.to(v.dtype), v[few, :end])
    return output.view(cells, heads, length, head_dim)


def per_head(values: Tensor, heads: int) -> Tensor:
    """A row for each head of each cell: (B, T) → (B·H, 1, T)."""
    return values.repeat_interleave(heads, dim=0)[:, None]


def slices(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size`, at least 1, that make up `n`."""
    return (slice(start, start + max(size, 1)) for start in range(0, n, max(size, 1)))
