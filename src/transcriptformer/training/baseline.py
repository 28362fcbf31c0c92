"""The frequency baseline: the loss of a model without context, from gene frequencies and mean counts."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transcriptformer.config import LossConfig, ModelConfig
from transcriptformer.data.batches import Batch
from transcriptformer.data.tokenize import Tokens
from transcriptformer.model.losses import zero_truncated_poisson_nll
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.storage.sealed import read_json, read_sealed, write_json, write_sealed

SMOOTHING = 0.5
"""Pseudocount of each token."""

MAX_SHARE_OF_SOFTCAP = 0.95
"""Initial logits are clipped to this share of the soft cap."""


@dataclass(frozen=True)
class GeneStatistics:
    """Frequency and mean count of each token.

    Attributes
    ----------
    occurrences
        Number of cells that express the token (tokens,), float64.
    rates
        Mean count in these cells (tokens,), float64; 1 if there are none.
    """

    occurrences: np.ndarray
    rates: np.ndarray

    @classmethod
    def from_tokens(cls, parts: Iterable[Tokens], n_tokens: int) -> "GeneStatistics":
        """Compute the statistics of cells."""
        occurrences, totals = np.zeros(n_tokens), np.zeros(n_tokens)
        for tokens in parts:
            occurrences += np.bincount(tokens.genes, minlength=n_tokens)
            totals += np.bincount(tokens.genes, weights=tokens.counts, minlength=n_tokens)
        return cls(occurrences, np.where(occurrences > 0, totals / np.maximum(occurrences, 1), 1.0))

    @property
    def log_frequencies(self) -> np.ndarray:
        """Log frequency of each token (tokens,)."""
        smoothed = self.occurrences + SMOOTHING
        return np.log(smoothed / smoothed.sum())

    def save(self, path: Path) -> None:
        """Write a sealed file."""
        write_sealed(path, {"occurrences": self.occurrences, "rates": self.rates})

    @classmethod
    def load(cls, path: Path) -> "GeneStatistics":
        """Read what `save` wrote; raise DamagedError if it has changed."""
        return cls(**read_sealed(path))


class Baseline(NamedTuple):
    """Negative log-likelihoods per gene, without a model.

    Attributes
    ----------
    gene_nll
        Genes are drawn by frequency.
    count_nll
        Counts are predicted by the mean count of the gene, or by its share of the cell's total, whichever is better.
    """

    gene_nll: float
    count_nll: float

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        write_json(path, self._asdict())

    @classmethod
    def load(cls, path: Path) -> "Baseline":
        """Read what `save` wrote; raise DamagedError if it has changed."""
        return cls(**read_json(path))


def measure_baseline(
    statistics: GeneStatistics, batches: Iterable[Batch], pad: int, model: ModelConfig, loss: LossConfig, clip: float
) -> Baseline:
    """Measure the baseline on held-out cells, with the same losses as the model."""
    log_frequencies = torch.from_numpy(statistics.log_frequencies).float()
    rates = torch.from_numpy(statistics.rates).float()
    sums = np.zeros(3)
    n_genes = 0
    for batch in batches:
        is_gene = batch.gene_tokens != pad
        rate = rates[batch.gene_tokens].masked_fill(~is_gene, 0)  # (B, L)
        total = (batch.gene_counts * is_gene).sum(-1, keepdim=True)
        shares = rate / rate.sum(-1, keepdim=True) * total

        def nll(mu: Tensor, batch: Batch = batch, is_gene: Tensor = is_gene) -> float:
            per_gene = zero_truncated_poisson_nll(
                mu, batch.gene_counts, model.log_counts_eps, clip, loss.softplus_approx
            )
            return float(per_gene[is_gene].sum())

        sums += -float(log_frequencies[batch.gene_tokens][is_gene].sum()), nll(rate), nll(shares)
        n_genes += int(is_gene.sum())
    gene_nll, by_rate, by_share = sums / max(1, n_genes)
    return Baseline(float(gene_nll), float(min(by_rate, by_share)))


@torch.no_grad()
def start_from_frequencies(model: TranscriptFormer, statistics: GeneStatistics) -> None:
    """Initialize the heads of a new model from `statistics`.

    The gene head predicts gene frequencies and, if its link function allows it, the count head mean counts.
    """
    head: Any
    if model.gene_id_head is not None:
        head, cap = model.gene_id_head.layers[-1], model.config.softcap
        logits = torch.from_numpy(statistics.log_frequencies)
        logits = logits - (logits.max() + logits.min()) / 2
        if cap > 0:
            limit = MAX_SHARE_OF_SOFTCAP
            logits = cap * torch.atanh((logits / cap).clamp(-limit, limit))
        head.bias.copy_(logits)
        head.weight.zero_()
    if model.config.mu_link_fn in ("softmax", "exp"):
        head = model.mu.mlp.layers[-1]
        head.bias.zero_()
        head.weight.zero_()
        model.mu.gene_embedding.weight.copy_(torch.from_numpy(np.log(statistics.rates))[:, None])
