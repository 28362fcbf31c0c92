"""Expression-aware causal attention: mask, score bias and definition, which `blockwise` and `flex` compute faster.

Notation: B cells, H heads, T positions (auxiliary tokens, then genes), d = D / H.

The score of query i and key j is

    s = qᵢ · kⱼ / √d + log1p(cⱼ + eps)        without the bias at i = j during training
    s = softcap · tanh(s / softcap)            if softcap > 0

A query sees the allowed keys j ≤ i: neither [PAD] nor an unknown auxiliary token. The output of a query that sees no
key is 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SCORE_LIMIT = 1e6
"""Scores are clamped to ± this value before the soft cap, so that they stay finite."""


class ScoreMod(NamedTuple):
    """Modification of the scores q · k / √d of a batch, the same in every layer.

    Attributes
    ----------
    key_bias
        Bias of each key (B, T); see `count_bias`.
    key_allowed
        Mask of the keys that queries may see (B, T); see `visible_keys`.
    softcap
        Soft cap of the scores; 0: none.
    bias_on_diagonal
        Whether a query adds the bias to its own key: True for embeddings, False during training.
    """

    key_bias: Tensor
    key_allowed: Tensor
    softcap: float
    bias_on_diagonal: bool

    @property
    def key_mask(self) -> Tensor:
        """Additive mask of the keys (B, T), float32: 0 if allowed, else −∞."""
        mask = torch.zeros_like(self.key_allowed, dtype=torch.float32)
        return mask.masked_fill_(~self.key_allowed, -torch.inf)


Attention = Callable[[Tensor, Tensor, Tensor, ScoreMod], Tensor]
"""Maps queries, keys and values (B, H, T, d) to the output (B, H, T, d)."""


def count_bias(counts: Tensor, eps: float) -> Tensor:
    """Return the bias of each key from its count, log1p(c + eps), (B, T)."""
    return torch.log1p(counts + eps)


def visible_keys(key_allowed: Tensor) -> Tensor:
    """Return the mask (B, T, T) of the keys each query sees, given the allowed keys (B, T).

    For four positions, an unknown auxiliary token, two genes and [PAD]::

        query ↓ key →   0 1 2 3
                    0   . . . .
                    1   . x . .
                    2   . x x .
                    3   . x x .
    """
    length = key_allowed.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=key_allowed.device).tril()
    return causal & key_allowed[:, None, :]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mod: ScoreMod) -> Tensor:
    """Compute the definition with all scores at once, in float32; returns (B, H, T, d) in the dtype of `v`."""
    scores = q.float() @ k.float().mT / q.shape[-1] ** 0.5  # (B, H, T, T)
    bias = mod.key_bias.float()[:, None, None, :].expand_as(scores)
    if not mod.bias_on_diagonal:
        bias = bias - torch.diag_embed(torch.diagonal(bias, dim1=-2, dim2=-1))
    scores = scores + bias
    if mod.softcap > 0:
        scores = mod.softcap * torch.tanh(scores.clamp(-SCORE_LIMIT, SCORE_LIMIT) / mod.softcap)
    visible = visible_keys(mod.key_allowed)[:, None]  # (B, 1, T, T)
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    weights = weights.masked_fill(~visible, 0)  # 0 instead of NaN for queries that see no key
    return (weights @ v.float()).to(v.dtype)
