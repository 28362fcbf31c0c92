"""Imputation: which of the genes that a cell lacks the model expects in it, and with what count."""

import logging
from collections.abc import Iterator, Mapping, Sequence
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
from transcriptformer.generation.gene_names import gene_tokens
from transcriptformer.generation.generate import GENERATION_KEY, OnProgress
from transcriptformer.generation.prompts import aux_tokens, require_gene_head
from transcriptformer.generation.real_cells import Cells, Source, open_cells, read_cells, require_counts
from transcriptformer.model.layers import ELEMENTWISE_LINK
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.batch_size import batch_limits
from transcriptformer.runs.output import PROVENANCE_KEY, provenance_of

logger = logging.getLogger(__name__)

PROBABILITY_LAYER = "probability"


class Expected(NamedTuple):
    """Predictions for a batch of cells and all queried genes.

    Attributes
    ----------
    log_p
        Log-probability to be the next gene, over all tokens (B, Q).
    counts
        Expected counts (B, Q); NaN for cells without genes.
    """

    log_p: Tensor
    counts: Tensor


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
    An AnnData (cells, queried genes), float32. `X` holds the observed counts and, for genes that a cell lacks, the
    expected count if the gene is expressed. `layers['probability']` holds the probability of each lacking gene to be
    the next one, renormalized over the queried genes that the cell lacks, and NaN for observed genes.

    Raises
    ------
    TranscriptFormerError
        If an argument or the data cannot be used, or the model predicts no genes.
    """
    network = require_gene_head(model)
    require_counts(model)
    queried = _queried(genes, model)
    given = {"assay": assay, **(metadata or {})}
    is_given, given_tokens = [given.get(column) is not None for column in model.aux_vocabs], aux_tokens(model, 1, given)
    reader = open_cells(data, model, seed)
    network.to(model.device)
    network.gene_embeddings.keep_embeddings()
    heads = QueryHeads(network, queried)
    parts, n_done = [], 0
    try:
        # The state after these predicts the last position at which the model was trained to predict a gene, not [END].
        for cells in read_cells(reader, max(0, network.config.seq_len - 2)):
            cells = cells._replace(aux_tokens=np.where(is_given, given_tokens, cells.aux_tokens))
            parts.append(_impute_block(cells, model, heads))
            n_done += len(cells.names)
            if on_progress is not None:
                on_progress(n_done, len(reader))
    finally:
        reader.source.close()
    names, counts, probability = zip(*parts, strict=True)
    with anndata.settings.override(check_uniqueness=False):  # cells of a file may share a name
        result = anndata.AnnData(
            np.concatenate(counts),
            obs=pd.DataFrame(index=names[0].append(list(names[1:]))),
            var=pd.DataFrame(index=pd.Index(model.gene_vocab.names()[queried].astype(str))),
            layers={PROBABILITY_LAYER: np.concatenate(probability)},
        )
    result.uns[PROVENANCE_KEY] = provenance_of([data], model, model.weights_sha256(), [reader.source.describe()])
    result.uns[GENERATION_KEY] = {"renormalized_over": "queried genes that the cell lacks", "seed": seed}
    return result


def _queried(genes: Sequence[str] | str, checkpoint: Checkpoint) -> np.ndarray:
    """Return the tokens of the queried genes (Q,)."""
    vocab = checkpoint.gene_vocab
    if isinstance(genes, str):
        if genes != "all":
            raise UsageError(f"genes (--impute): {genes!r} must be 'all' or a list of genes")
        return np.arange(len(vocab.special_tokens), len(vocab))
    tokens = gene_tokens(list(genes), checkpoint, "genes (--impute)")
    if not len(tokens):
        raise UsageError("genes (--impute): give at least one gene, or all")
    repeated = pd.Index(tokens).duplicated()
    if repeated.any():
        raise UsageError(f"genes (--impute): gene {vocab.names()[tokens[repeated][0]]} occurs twice")
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
        """Predict the queried genes behind each cell."""
        model = self.model
        encoded = model(batch.gene_tokens, batch.gene_counts, batch.aux_tokens)
        n_genes = encoded.is_gene.sum(1)
        last = encoded.hidden[torch.arange(len(n_genes), device=n_genes.device), n_genes]  # (B, D)
        log_p = torch.log_softmax(model.gene_logits(last), dim=1)[:, self.queried]
        u = model.mu.before_link_of_pairs(last, self.projected, self.queried)  # (B, Q)
        genes = batch.gene_tokens
        own = model.mu.before_link(encoded.hidden, model.gene_embeddings(genes), genes)  # (B, L)
        total = (batch.gene_counts * encoded.is_gene).sum(1, keepdim=True)
        if model.mu.link == "softmax":
            counts = total * (u - own.masked_fill(~encoded.is_gene, -torch.inf).logsumexp(1, keepdim=True)).exp()
        else:
            link = ELEMENTWISE_LINK[model.mu.link]
            counts = link(u) * total / (link(own) * encoded.is_gene).sum(1, keepdim=True)
        return Expected(log_p, counts.masked_fill(n_genes[:, None] == 0, torch.nan))


def _impute_block(cells: Cells, checkpoint: Checkpoint, heads: QueryHeads) -> tuple[pd.Index, np.ndarray, np.ndarray]:
    """Return names (cells,), counts and probabilities (cells, Q) of some cells."""
    queried = heads.queried.cpu().numpy()
    observed = _dense(cells.expressed, queried, len(checkpoint.gene_vocab))
    counts, probability = np.full_like(observed, np.nan), np.full_like(observed, np.nan)
    for batch in _batches(cells, checkpoint):
        rows, expected = batch.rows.numpy(), heads(batch.to(checkpoint.device))
        is_lacking = torch.from_numpy(observed[rows] == 0).to(checkpoint.device)
        p = expected.log_p.masked_fill(~is_lacking, -torch.inf).softmax(1)
        probability[rows] = p.masked_fill(~is_lacking, torch.nan).cpu().numpy()
        counts[rows] = expected.counts.cpu().numpy()
    return cells.names, np.where(observed > 0, observed, counts), probability


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
