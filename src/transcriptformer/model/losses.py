"""Likelihoods of counts and genes, as functions of tensors. All of them work per position, (B, L)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = {"cpu": 2**24, "mps": 2**25, "cuda": 2**27}
"""Logits that are in memory at a time, by device, unless those of one position are more."""


def zero_truncated_poisson_nll(
    mu: Tensor, counts: Tensor, eps: float, clip_counts: float, softplus_approx: bool
) -> Tensor:
    """Negative log-likelihood of counts ≥ 1 under a Poisson distribution that cannot be 0.

    −c·log(μ + eps) + log(exp(μ + eps) − 1) + log(c!), with c clamped to [eps, clip_counts].

    The logarithm log(eˣ − 1) is computed as x + log(1 − e⁻ˣ), which does not overflow.

    Parameters
    ----------
    mu, counts
        Expected and observed counts (B, L).
    softplus_approx
        Take log(eˣ − 1) as x − softplus(−x), as the published checkpoints were trained; otherwise exactly. Either is
        not let below 0.
    """
    c = counts.clamp(eps, clip_counts)
    x = mu + eps
    normalizer = x - F.softplus(-x) if softplus_approx else x + torch.log(-torch.expm1(-x))
    return -c * torch.log(x) + normalizer.clamp(min=0) + torch.lgamma(c + 1)


def gene_cross_entropy(
    to_logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, is_gene: Tensor, n_genes: int
) -> Tensor:
    """Cross-entropy (B, L) of the genes' logits against target tokens (B, L), 0 where there is no gene.

    Logits are made for some positions at a time, and once more for their gradients: (B, L, V) is never in memory.

    Parameters
    ----------
    to_logits
        From states (N, D) to logits (N, V).
    hidden
        States (B, L, D).
    n_genes
        Size of the vocabulary, V.
    """

    def of_some(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(to_logits(hidden).float(), targets, reduction="none")

    at_once = max(1, LOGITS_AT_ONCE[hidden.device.type] // n_genes)
    some = zip(torch.split(hidden[is_gene], at_once), torch.split(targets[is_gene], at_once), strict=True)
    if torch.is_grad_enabled():
        losses = [checkpoint(of_some, *parts, use_reentrant=False) for parts in some]
    else:
        losses = [of_some(*parts) for parts in some]
    return torch.zeros_like(targets, dtype=torch.float32).masked_scatter(is_gene, torch.cat(losses))


def mean_over_genes(values: Tensor, is_gene: Tensor) -> Tensor:
    """Mean of `values` (B, L) over each cell's genes (B,); NaN where a cell has none."""
    return values.masked_fill(~is_gene, 0).sum(-1) / is_gene.sum(-1)
