"""Negative log-likelihoods of counts and genes per position (B, L)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = {"cpu": 2**24, "mps": 2**25, "cuda": 2**27}
"""Maximum number of logits in memory by device; at least those of one position."""


MIN_RATE = 1e-6
"""Poisson rate below which a positive count is 1 in float32."""


def zero_truncated_poisson_nll(
    mu: Tensor, counts: Tensor, eps: float, clip_counts: float, softplus_approx: bool
) -> Tensor:
    """Negative log-likelihood of counts ≥ 1 under a zero-truncated Poisson distribution, Poisson(μ) given c > 0.

    −c·log(μ + eps) + log(exp(μ + eps) − 1) + log(c!), with c clamped to [eps, clip_counts].

    log(eˣ − 1) is computed as x + log(1 − e⁻ˣ), which does not overflow, and clamped to at least 0.

    Parameters
    ----------
    mu, counts
        Expected and observed counts (B, L).
    softplus_approx
        Approximate log(eˣ − 1) by x − softplus(−x), as in the training of the published checkpoints.
    """
    c = counts.clamp(eps, clip_counts)
    x = mu + eps
    normalizer = x - F.softplus(-x) if softplus_approx else x + torch.log(-torch.expm1(-x))
    return -c * torch.log(x) + normalizer.clamp(min=0) + torch.lgamma(c + 1)


def count_surprise(mu: Tensor, counts: Tensor) -> Tensor:
    """Return −log p(c | c > 0), exactly, of counts ≥ 1 with Poisson rates μ (B, L).

    Unlike the loss of training, it is no approximation, and its normalizer log(exp(μ) − 1) may be negative.
    """
    mu = mu.clamp(min=MIN_RATE)
    return -counts * torch.log(mu) + mu + torch.log(-torch.expm1(-mu)) + torch.lgamma(counts + 1)


def gene_cross_entropy(
    to_logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, is_gene: Tensor, n_genes: int
) -> Tensor:
    """Cross-entropy (B, L) of gene logits against target tokens (B, L), 0 at positions without a gene.

    Logits are computed in chunks of positions, and recomputed for the gradients, because (B, L, V) does not fit into
    memory.

    Parameters
    ----------
    to_logits
        Maps states (N, D) to logits (N, V).
    hidden
        States (B, L, D).
    n_genes
        Size of the vocabulary, V.
    """

    def of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(to_logits(hidden).float(), targets, reduction="none")

    size = max(1, MAX_LOGITS[hidden.device.type] // n_genes)
    chunks = zip(torch.split(hidden[is_gene], size), torch.split(targets[is_gene], size), strict=True)
    if torch.is_grad_enabled():
        losses = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        losses = [of_chunk(*chunk) for chunk in chunks]
    return torch.zeros_like(targets, dtype=torch.float32).masked_scatter(is_gene, torch.cat(losses))


def mean_over_genes(values: Tensor, is_gene: Tensor) -> Tensor:
    """Average `values` (B, L) over the genes of each cell (B,); NaN for cells without genes."""
    return values.masked_fill(~is_gene, 0).sum(-1) / is_gene.sum(-1)
