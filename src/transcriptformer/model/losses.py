"""Likelihoods of counts and genes, as functions of tensors. All of them work per position, (B, L)."""

import torch
from torch import Tensor
from torch.nn import functional as F


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


def gene_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (B, L) of gene logits (B, L, V) against target tokens (B, L)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def mean_over_genes(values: Tensor, is_gene: Tensor) -> Tensor:
    """Mean of `values` (B, L) over each cell's genes (B,); NaN where a cell has none."""
    return values.masked_fill(~is_gene, 0).sum(-1) / is_gene.sum(-1)
