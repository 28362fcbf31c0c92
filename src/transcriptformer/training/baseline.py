"""What a model that knows no context would reach: how often each gene occurs, and how high its count is."""

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
"""Added to how often each token occurs, for what was not seen is not impossible."""

MOST_OF_SOFTCAP = 0.95
"""Logits begin within this share of the soft cap."""


@dataclass(frozen=True)
class GeneStatistics:
    """What some cells say about each token on its own.

    Attributes
    ----------
    occurrences
        Cells that express it (tokens,), float64.
    rates
        Mean of its counts in these cells (tokens,), float64; 1 where there are none.
    """

    occurrences: np.ndarray
    rates: np.ndarray

    @classmethod
    def of(cls, parts: Iterable[Tokens], n_tokens: int) -> "GeneStatistics":
        """Count the tokens of `parts`."""
        occurrences, totals = np.zeros(n_tokens), np.zeros(n_tokens)
        for tokens in parts:
            occurrences += np.bincount(tokens.genes, minlength=n_tokens)
            totals += np.bincount(tokens.genes, weights=tokens.counts, minlength=n_tokens)
        return cls(occurrences, np.where(occurrences > 0, totals / np.maximum(occurrences, 1), 1.0))

    @property
    def log_frequencies(self) -> np.ndarray:
        """Logarithm of the share of each token (tokens,)."""
        smoothed = self.occurrences + SMOOTHING
        return np.log(smoothed / smoothed.sum())

    def save(self, path: Path) -> None:
        """Write to a sealed file."""
        write_sealed(path, {"occurrences": self.occurrences, "rates": self.rates})

    @classmethod
    def load(cls, path: Path) -> "GeneStatistics":
        """Read what `save` wrote; DamagedError where it is not as it was."""
        return cls(**read_sealed(path))


class Baseline(NamedTuple):
    """Negative log-likelihoods per gene that need no model.

    Attributes
    ----------
    gene_nll
        Each gene is drawn by its frequency, whatever came before.
    count_nll
        Each count is drawn by its gene's rate, or by that rate's share in the cell's total, whichever fits better.
    """

    gene_nll: float
    count_nll: float

    def save(self, path: Path) -> None:
        """Write to a JSON file."""
        write_json(path, self._asdict())

    @classmethod
    def load(cls, path: Path) -> "Baseline":
        """Read what `save` wrote; DamagedError where it is not as it was."""
        return cls(**read_json(path))


def measure_baseline(
    statistics: GeneStatistics, batches: Iterable[Batch], pad: int, model: ModelConfig, loss: LossConfig, clip: float
) -> Baseline:
    """Likelihoods of other cells under `statistics`, by the formulas that the model is judged by."""
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
    """Let the heads of a new model begin with what `statistics` say.

    The gene head begins with how often a gene occurs; the count head, where its link function allows it, with how high
    its count is.
    """
    head: Any
    if model.gene_id_head is not None:
        head, cap = model.gene_id_head.layers[-1], model.config.softcap
        logits = torch.from_numpy(statistics.log_frequencies)
        logits = logits - (logits.max() + logits.min()) / 2
        if cap > 0:
            most = MOST_OF_SOFTCAP
            logits = cap * torch.atanh((logits / cap).clamp(-most, most))
        head.bias.copy_(logits)
        head.weight.zero_()
    if model.config.mu_link_fn in ("softmax", "exp"):
        head = model.mu.mlp.layers[-1]
        head.bias.zero_()
        head.weight.zero_()
        model.mu.gene_embedding.weight.copy_(torch.from_numpy(np.log(statistics.rates))[:, None])
