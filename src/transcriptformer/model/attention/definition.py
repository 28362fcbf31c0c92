"""Expression-aware causal attention: its mask, its score bias and its definition.

`blockwise` and `flex` compute the same faster. All three must agree.

Notation: B cells, H heads, T positions (auxiliary tokens first, then genes), d = D / H.

The score between query i and key j is

    s = qᵢ · kⱼ / √d + log1p(cⱼ + eps)        the bias is left out at i = j during training
    s = softcap · tanh(s / softcap)            if softcap > 0

and a query sees the keys j ≤ i that are allowed (neither [PAD] nor an unknown auxiliary token). A query that sees no
key gives 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SCORE_LIMIT = 1e6
"""Scores are clamped to ± this before the soft cap, so that an overflow stays finite."""


class ScoreMod(NamedTuple):
    """What turns q · k / √d into the scores of a batch; the same in every layer.

    Attributes
    ----------
    key_bias
        Added to every score of a key (B, T); see `count_bias`.
    key_allowed
        Keys that queries may see (B, T); see `visible_keys`.
    softcap
        0: scores are not capped.
    bias_on_diagonal
        Whether a query adds the bias to its own key: True for embeddings, False during training.
    """

    key_bias: Tensor
    key_allowed: Tensor
    softcap: float
    bias_on_diagonal: bool

    @property
    def key_mask(self) -> Tensor:
        """What to add to the capped scores of each key: −∞ where it is not allowed, else 0; (B, T), float32."""
        mask = torch.zeros_like(self.key_allowed, dtype=torch.float32)
        return mask.masked_fill_(~self.key_allowed, -torch.inf)


Attention = Callable[[Tensor, Tensor, Tensor, ScoreMod], Tensor]
"""Queries, keys and values (B, H, T, d) → the attention's output (B, H, T, d)."""


def count_bias(counts: Tensor, eps: float) -> Tensor:
    """Bias of each key from its count: log1p(c + eps), (B, T)."""
    return torch.log1p(counts + eps)


def visible_keys(key_allowed: Tensor) -> Tensor:
    """Mask (B, T, T) of the keys each query sees, given which keys are allowed (B, T).

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


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mod: ScoreMod) -> Tensor:
    """The definition: all scores at once, in float32, on any device; (B, H, T, d), in the type of `v`."""
    scores = q.float() @ k.float().mT / q.shape[-1] ** 0.5  # (B, H, T, T)
    bias = mod.key_bias.float()[:, None, None, :].expand_as(scores)
    if not mod.bias_on_diagonal:
        bias = bias - torch.diag_embed(torch.diagonal(bias, dim1=-2, dim2=-1))
    scores = scores + bias
    if mod.softcap > 0:
        scores = mod.softcap * torch.tanh(scores.clamp(-SCORE_LIMIT, SCORE_LIMIT) / mod.softcap)
    visible = visible_keys(mod.key_allowed)[:, None]  # (B, 1, T, T)
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    weights = weights.masked_fill(~visible, 0)  # a query without keys: 0 instead of NaN
    return (weights @ v.float()).to(v.dtype)
