"""Imputation: which of the genes that a cell lacks the model expects in it, and with what count."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.batches import Batch, make_batches
from transcriptformer.data.reader import CellBlock
from transcriptformer.data.tokenize import Tokens
from transcriptformer.errors import UsageError
from transcriptformer.generation.finite import gene_log_probabilities, require_finite
from transcriptformer.generation.gene_names import distinct_tokens
from transcriptformer.generation.generate import GENERATION_KEY, OnProgress
from transcriptformer.generation.prompts import require_gene_head
from transcriptformer.generation.real_cells import Cells, Source, opened_cells, require_counts
from transcriptformer.generation.sample import MIN_MU
from transcriptformer.model.layers import ELEMENTWISE_LINK
from transcriptformer.model.losses import MAX_LOGITS
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.batch_size import batch_limits
from transcriptformer.runs.module import prepare_encoder
from transcriptformer.runs.output import PROVENANCE_KEY, provenance_of
from transcriptformer.runtime.memory import Halving

PROBABILITY_LAYER, RATE_LAYER = "probability", "rate"


class Expected(NamedTuple):
    """Predictions for a batch of cells and all queried genes.

    Attributes
    ----------
    log_p
        Log-probability to be the next gene, over all tokens (B, Q).
    rate
        Rate μ of the count's Poisson distribution (B, Q); NaN for cells without genes.
    """

    log_p: Tensor
    rate: Tensor

    def followed_by(self, other: "Expected") -> "Expected":
        """Return predictions with those of more cells behind."""
        return Expected(torch.cat([self.log_p, other.log_p]), torch.cat([self.rate, other.rate]))


def impute(
    data: Source,
    model: Checkpoint,
    genes: Sequence[str] | str = "all",
    *,
    assay: str | None = None,
    metadata: Mapping[str, str] | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> anndata.AnnData:
    """Predict genes that cells lack, each from the cell alone, without sampling.

    Parameters
    ----------
    data
        Cells, as a path or AnnData.
    model
        Checkpoint returned by `load`.
    genes
        Queried genes, by id or symbol, or all.
    assay, metadata
        Assay, and values of other metadata columns, of all cells; None: as in `data`.
    seed
        Seed of the order of each cell's genes.
    on_progress
        Called with the number of cells done and of all cells.

    Returns
    -------
    An AnnData (cells that pass the filters, queried genes), float32. `X` holds the observed counts and, for genes that
    a cell lacks, the mean count if the gene is expressed, μ / (1 − exp(−μ)) ≥ 1. `layers['rate']` holds μ of lacking
    genes, and `layers['probability']` their probability to be the next one, renormalized over the queried genes that
    the cell lacks; both are NaN for observed genes.

    Raises
    ------
    TranscriptFormerError
        If an argument or the data cannot be used, or the model predicts no genes.
    """
    network = require_gene_head(model)
    require_counts(model)
    queried = _queried(genes, model)
    parts, n_done = list[Imputed](), 0
    # The state after so many genes predicts the last position at which the model was trained to predict a gene.
    max_genes = max(0, network.max_genes - 1)
    with opened_cells(data, model, seed, max_genes, {"assay": assay, **(metadata or {})}) as real:
        inferred = real.reader.source.describe()
        network.to(model.device)
        prepare_encoder(network, model.config.model.inference_config, real.lengths, model.device)
        advice = "use another device or --precision 16-mixed"
        predict = Halving(QueryHeads(network, queried), Batch.size, Batch.halves, Expected.followed_by, "cell", advice)
        for cells in real.blocks():
            parts.append(_impute_block(cells, model, queried, predict))
            n_done += len(cells.names)
            if on_progress is not None:
                on_progress(n_done, len(real.lengths))
    names, counts, probability, rate = zip(*parts, strict=True)
    with anndata.settings.override(check_uniqueness=False):  # cells of a file may share a name
        result = anndata.AnnData(
            np.concatenate(counts),
            obs=pd.DataFrame(index=names[0].append(list(names[1:]))),
            var=pd.DataFrame(index=pd.Index(model.gene_vocab.names()[queried].astype(str))),
            layers={PROBABILITY_LAYER: np.concatenate(probability), RATE_LAYER: np.concatenate(rate)},
        )
    result.uns[PROVENANCE_KEY] = provenance_of([data], model, model.weights_sha256(), [inferred])
    result.uns[GENERATION_KEY] = {"renormalized_over": "queried genes that the cell lacks", "seed": seed}
    return result


def _queried(genes: Sequence[str] | str, checkpoint: Checkpoint) -> np.ndarray:
    """Return the tokens of the queried genes (Q,)."""
    vocab = checkpoint.gene_vocab
    if isinstance(genes, str):
        if genes != "all":
            raise UsageError(f"genes (--impute): {genes!r} must be 'all' or a list of genes")
        return np.arange(len(vocab.special_tokens), len(vocab))
    tokens = distinct_tokens(list(genes), checkpoint, "genes (--impute)")
    if not len(tokens):
        raise UsageError("genes (--impute): give at least one gene, or all")
    return tokens


class QueryHeads:
    """The heads of the model for a fixed set of queried genes, whose own share is computed once.

    Parameters
    ----------
    queried
        Tokens of the genes (Q,).
    """

    def __init__(self, model: TranscriptFormer, queried: np.ndarray) -> None:
        self.model, self.queried = model, torch.from_numpy(queried).to(next(model.parameters()).device)
        with torch.inference_mode():
            self.projected = model.mu.project_genes(model.gene_embeddings(self.queried))  # (Q, D / 2)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Expected:
        """Predict the queried genes behind each cell, on the CPU."""
        model, genes = self.model, batch.gene_tokens
        encoded = model(genes, batch.gene_counts, batch.aux_tokens)
        n_genes = encoded.is_gene.sum(1)
        last = encoded.hidden[torch.arange(len(n_genes), device=n_genes.device), n_genes]  # (B, D)
        own = model.mu.before_link(encoded.hidden, model.gene_embeddings(genes), genes)  # (B, L)
        if model.mu.link == "softmax":
            own_sum = own.masked_fill(~encoded.is_gene, -torch.inf).logsumexp(1)  # log Σ eᵘ
        else:
            own_sum = ELEMENTWISE_LINK[model.mu.link](own).masked_fill(~encoded.is_gene, 0).sum(1)
        total = (batch.gene_counts * encoded.is_gene).sum(1)
        n_at_once = max(1, MAX_LOGITS[last.device.type] // model.mu.gene_embedding.num_embeddings)
        chunks = zip(*(torch.split(values, n_at_once) for values in (last, own_sum, total)), strict=True)
        return reduce(Expected.followed_by, [self._predict(*chunk) for chunk in chunks])

    def _predict(self, last: Tensor, own_sum: Tensor, total: Tensor) -> Expected:
        """Predict the queried genes after states (b, D), given Σ μ, or its logarithm, and Σ c of each cell (b,)."""
        model, own_sum, total = self.model, own_sum[:, None], total[:, None]
        log_p = gene_log_probabilities(model, last)[:, self.queried]
        u = model.mu.before_link_of_pairs(last, self.projected, self.queried)  # (b, Q)
        if model.mu.link == "softmax":
            rate = total * (u - own_sum).exp()
        else:
            rate = ELEMENTWISE_LINK[model.mu.link](u) * total / own_sum
        has_genes = total[:, 0] > 0
        require_finite("counts", rate[has_genes])
        return Expected(log_p.cpu(), rate.masked_fill(~has_genes[:, None], torch.nan).cpu())


def count_if_expressed(rate: np.ndarray) -> np.ndarray:
    """Return the mean of a Poisson(μ) given that it is not 0, μ / (1 − e^−μ): near 1 for small μ, μ for large."""
    mu = np.maximum(rate.astype(np.float64), MIN_MU)
    return (mu / -np.expm1(-mu)).astype(np.float32)


class Imputed(NamedTuple):
    """Imputed cells: names (cells,), and counts, probabilities and rates (cells, Q)."""

    names: pd.Index
    counts: np.ndarray
    probability: np.ndarray
    rate: np.ndarray


def _impute_block(
    cells: Cells, checkpoint: Checkpoint, queried: np.ndarray, predict: Callable[[Batch], Expected]
) -> Imputed:
    """Impute some cells."""
    observed = _dense(cells.expressed, queried, len(checkpoint.gene_vocab))
    probability, rate = np.empty_like(observed), np.empty_like(observed)
    for batch in _batches(cells, checkpoint):
        rows, expected = batch.rows.numpy(), predict(batch.to(checkpoint.device))
        is_observed = torch.from_numpy(observed[rows] > 0)
        p = expected.log_p.masked_fill(is_observed, -torch.inf).softmax(1)
        probability[rows] = p.masked_fill(is_observed, torch.nan).numpy()
        rate[rows] = expected.rate.masked_fill(is_observed, torch.nan).numpy()
    return Imputed(cells.names, np.where(observed > 0, observed, count_if_expressed(rate)), probability, rate)


def _batches(cells: Cells, checkpoint: Checkpoint) -> Iterator[Batch]:
    block = CellBlock(np.arange(len(cells.names)), cells.tokens, cells.aux_tokens)
    seq_len = checkpoint.config.model.model_config.seq_len
    return make_batches(block, batch_limits(checkpoint), checkpoint.gene_vocab.pad, seq_len)


def _dense(tokens: Tokens, queried: np.ndarray, n_tokens: int) -> np.ndarray:
    """Return the counts of the queried genes (cells, Q), float32."""
    column = np.full(n_tokens, -1)
    column[queried] = np.arange(len(queried))
    kept = tokens.keep(column[tokens.genes] >= 0)
    dense = np.zeros((len(tokens.lengths), len(queried)), np.float32)
    dense[kept.rows, column[kept.genes]] = kept.counts
    return dense
