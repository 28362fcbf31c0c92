"""Drawing cells from the model: which gene comes next, then its count, until a cell has its number of genes.

Notation: B cells, L genes of the longest, P of the longest prompt, V size of the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from transcriptformer.config import require_positive, require_ranges
from transcriptformer.generation.finite import gene_log_probabilities, require_finite
from transcriptformer.generation.prompts import Prompt
from transcriptformer.model.cache import KeyValueCache
from transcriptformer.model.layers import ELEMENTWISE_LINK
from transcriptformer.model.losses import gene_cross_entropy
from transcriptformer.model.transcriptformer import Encoded, TranscriptFormer

MIN_MU, MAX_MU = 1e-6, 1e9
"""Limits of expected counts, between which the quantiles of a Poisson distribution are accurate."""

MAX_SEED = 2**63 - 1

GROWTH = 2**31
"""Number of the random numbers that draw genes; not 0, with which they would be those that shuffle a cell's genes."""


@dataclass(frozen=True)
class Sampling:
    """How genes and counts are drawn.

    Attributes
    ----------
    temperature
        Probabilities are raised to the power 1 / temperature: towards 0, the most probable gene.
    top_p
        Draw from the most probable genes that together reach this probability.
    count_rounds
        How often all counts are drawn again once all genes of a cell are known.
    seed
        Seed; each cell has random numbers of its own, which do not depend on the batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    count_rounds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_ranges(self, "", {"temperature (--temperature)": (1e-6, 1e6)})
        require_positive(self, "", {"top_p (--top-p)": 1})
        require_ranges(self, "", {"count_rounds (--count-rounds)": (0, 100), "seed (--seed)": (0, MAX_SEED)})


class NewCells(NamedTuple):
    """Cells to draw.

    Attributes
    ----------
    rows
        Number of each cell (B,), which together with the seed determines its random numbers.
    prompts
        Genes that each cell begins with.
    aux_tokens
        Auxiliary tokens (B, A), int64.
    n_genes
        Number of genes of each cell, with those of its prompt (B,).
    totals
        Total count of each cell, with those of its prompt (B,).
    """

    rows: np.ndarray
    prompts: Sequence[Prompt]
    aux_tokens: np.ndarray
    n_genes: np.ndarray
    totals: np.ndarray

    def take(self, cells: np.ndarray) -> "NewCells":
        """Return some cells, given their indices."""
        rows, prompts, *arrays = self
        return NewCells(rows[cells], [prompts[cell] for cell in cells], *(array[cells] for array in arrays))

    @property
    def n_given(self) -> np.ndarray:
        """Number of genes of each prompt (B,)."""
        return np.array([len(prompt.tokens) for prompt in self.prompts], np.int64)


class Drawn(NamedTuple):
    """Drawn cells.

    Attributes
    ----------
    genes, counts
        Genes of each cell in order, then [PAD] with count 0 (B, L).
    log_likelihood
        Log-probability of each cell's genes, given their order and counts, over all tokens (B,).
    """

    genes: Tensor
    counts: Tensor
    log_likelihood: Tensor


def choose_genes(log_p: Tensor, allowed: Tensor, waits: Tensor, sampling: Sampling) -> Tensor:
    """Draw a gene for each cell (B,), with probability ∝ p^(1 / temperature) among the allowed ones.

    The gene whose clock rings first, if clock g rings after a random wait divided by p^(1 / temperature), has that
    probability. Rounding errors of p change the choice only if two clocks ring almost at once.

    Parameters
    ----------
    log_p
        Log-probability of each gene (B, V).
    allowed
        Mask of the genes to draw from (B, V).
    waits
        Exponentially distributed random numbers (B, V).
    """
    scores = log_p.masked_fill(~allowed, -torch.inf)
    scores = (scores - scores.amax(1, keepdim=True)) / sampling.temperature
    if sampling.top_p < 1:
        ordered, order = scores.sort(dim=1, descending=True)
        p = ordered.softmax(1)
        is_beyond = p.cumsum(1) - p >= sampling.top_p  # the genes before it suffice
        scores = scores.masked_fill(is_beyond.scatter(1, order, is_beyond), -torch.inf)
    return (scores - waits.log()).argmax(1)


def zero_truncated_poisson(mu: np.ndarray, uniform: np.ndarray, clip_counts: float) -> np.ndarray:
    """Return whole counts ≥ 1 of a Poisson(μ) given c > 0, clipped, at the quantiles `uniform` in [0, 1)."""
    mu = np.clip(mu.astype(np.float64), MIN_MU, MAX_MU)
    quantile = np.exp(-mu) - np.expm1(-mu) * uniform
    return np.clip(stats.poisson.ppf(quantile, mu), 1, max(1, np.floor(clip_counts))).astype(np.float32)


class Sampler:
    """Draws batches of cells.

    Parameters
    ----------
    model
        Model with a gene head, on its device.
    candidates
        Mask of the genes to draw from (V,), without special tokens.
    clip_counts
        Maximum count.
    on_genes
        Called after each step with the number of genes drawn.
    """

    def __init__(
        self,
        model: TranscriptFormer,
        sampling: Sampling,
        candidates: np.ndarray,
        clip_counts: float,
        on_genes: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.sampling, self.clip_counts, self.on_genes = model, sampling, clip_counts, on_genes
        self.device = next(model.parameters()).device
        self.candidates = torch.from_numpy(candidates).to(self.device)

    @torch.inference_mode()
    def __call__(self, cells: NewCells) -> Drawn:
        """Draw cells, each in its own order of genes."""
        aux_tokens = torch.from_numpy(cells.aux_tokens).to(self.device)
        genes, counts = self._padded_prompts(cells)  # (B, L)
        log_likelihood = self._grow(genes, counts, aux_tokens, cells)
        if self.sampling.count_rounds and genes.shape[1]:
            is_given = torch.from_numpy(np.arange(genes.shape[1]) < cells.n_given[:, None]).to(self.device)
            for number in range(self.sampling.count_rounds):
                drawn = self._draw_counts(self.model(genes, counts, aux_tokens), cells, number)
                counts = torch.where(is_given, counts, drawn)
            log_likelihood = self._log_likelihood(self.model(genes, counts, aux_tokens))
        return Drawn(genes, counts, log_likelihood)

    def _padded_prompts(self, cells: NewCells) -> tuple[Tensor, Tensor]:
        shape = len(cells.rows), int(cells.n_genes.max(initial=0))
        genes, counts = np.full(shape, self.model.pad), np.zeros(shape, np.float32)
        for row, prompt in enumerate(cells.prompts):
            genes[row, : len(prompt.tokens)], counts[row, : len(prompt.tokens)] = prompt
        return torch.from_numpy(genes).to(self.device), torch.from_numpy(counts).to(self.device)

    def _grow(self, genes: Tensor, counts: Tensor, aux_tokens: Tensor, cells: NewCells) -> Tensor:
        """Draw genes and counts (B, L) in place, and return the log-likelihood of each cell (B,)."""
        streams = [self._stream(row, GROWTH) for row in cells.rows]
        n_steps = int((cells.n_genes - cells.n_given).max(initial=0))
        n_given, n_genes = (torch.from_numpy(x).to(self.device) for x in (cells.n_given, cells.n_genes))
        totals = torch.from_numpy(cells.totals).float().to(self.device)
        cache, hidden, log_sum, log_likelihood = self._read_prompts(genes, counts, aux_tokens, cells, n_steps)
        allowed = self.candidates.repeat(len(genes), 1).scatter_(1, genes, False)  # (B, V)
        for step in range(n_steps):
            place = n_given + step  # (B,)
            is_growing = place < n_genes
            gene, log_p = self._draw_genes(hidden, allowed, streams)
            u = self.model.mu.before_link(hidden, self.model.gene_embeddings(gene), gene)  # (B,)
            log_sum = torch.logaddexp(log_sum, u)
            if self.model.mu.link == "softmax":
                # j of the n genes that share the total are known; the others count as the mean of these.
                mu = totals * (u - log_sum).exp() * (place + 1) / n_genes.clamp(min=1)
            else:
                mu = ELEMENTWISE_LINK[self.model.mu.link](u)
            require_finite("counts", mu)
            uniform = np.array([stream.random() for stream in streams])
            count = torch.from_numpy(zero_truncated_poisson(mu.cpu().numpy(), uniform, self.clip_counts))

            gene = torch.where(is_growing, gene, self.model.pad)
            count = torch.where(is_growing, count.to(self.device), 0)
            log_likelihood += torch.where(is_growing, log_p, 0)
            cell = torch.nonzero(is_growing)[:, 0]
            genes[cell, place[cell]], counts[cell, place[cell]] = gene[cell], count[cell]
            allowed.scatter_(1, gene[:, None], False)
            if step + 1 < n_steps:
                hidden = self.model.extend(cache, gene[:, None], count[:, None])[:, 0]
            if self.on_genes is not None:
                self.on_genes(len(cell))
        return log_likelihood

    def _draw_genes(
        self, hidden: Tensor, allowed: Tensor, streams: Sequence[np.random.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Return a gene after each state (B, D), and its log-probability over all tokens (B,)."""
        waits = np.stack([stream.standard_exponential(allowed.shape[1]) for stream in streams])
        log_p = gene_log_probabilities(self.model, hidden)  # (B, V)
        gene = choose_genes(log_p, allowed, torch.from_numpy(waits).float().to(self.device), self.sampling)
        return gene, log_p.gather(1, gene[:, None])[:, 0]

    def _read_prompts(
        self, genes: Tensor, counts: Tensor, aux_tokens: Tensor, cells: NewCells, n_steps: int
    ) -> tuple[KeyValueCache, Tensor, Tensor, Tensor]:
        """Return the cache and state after each prompt (B, D), log Σ eᵘ of its genes and their log-likelihood (B,)."""
        model, n_given = self.model, torch.from_numpy(cells.n_given).to(self.device)
        longest = int(n_given.max())
        cache, states = model.begin(aux_tokens, longest + n_steps)
        if not longest:
            nothing = states.new_zeros(len(genes))
            return cache, states[:, 0], nothing - torch.inf, nothing.clone()
        genes, counts = genes[:, :longest], counts[:, :longest]
        states = torch.cat([states, model.extend(cache, genes, counts)], dim=1)  # (B, 1 + P, D)
        encoded = Encoded(states[:, :-1], genes != model.pad, genes != model.pad, genes, counts)
        u = model.mu.before_link(encoded.hidden, model.gene_embeddings(genes), genes)  # (B, P)
        log_sum = u.masked_fill(~encoded.is_gene, -torch.inf).logsumexp(1)
        hidden = states[torch.arange(len(genes), device=self.device), n_given]
        return cache, hidden, log_sum, self._log_likelihood(encoded)

    def _log_likelihood(self, encoded: Encoded) -> Tensor:
        """Return the log-probability of each cell's genes, over all tokens (B,)."""
        parts = encoded.hidden, encoded.gene_tokens, encoded.is_gene, len(self.candidates)
        losses = gene_cross_entropy(self.model.gene_logits, *parts)
        require_finite("probabilities", losses)
        return -losses.sum(1)

    def _draw_counts(self, encoded: Encoded, cells: NewCells, number: int) -> Tensor:
        """Draw the counts of all genes (B, L) in a numbered round."""
        expected = self.model.expected_counts(encoded)
        require_finite("counts", expected)
        mu = expected.cpu().numpy()
        if self.model.mu.link == "softmax":  # μ is a share of the present counts, not of the wanted total
            mu *= (cells.totals / np.maximum(encoded.gene_counts.sum(1).cpu().numpy(), 1))[:, None]
        uniform = np.zeros(mu.shape)
        for row, cell, n_genes in zip(uniform, cells.rows, cells.n_genes, strict=True):
            row[:n_genes] = self._stream(cell, 1 + number).random(n_genes)
        drawn = torch.from_numpy(zero_truncated_poisson(mu, uniform, self.clip_counts)).to(self.device)
        return drawn * encoded.is_gene

    def _stream(self, row: int, number: int) -> np.random.Generator:
        """Return one of the random number streams of a cell; no number is 0."""
        return np.random.default_rng([self.sampling.seed, int(row), number])
