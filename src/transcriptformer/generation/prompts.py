"""Prompts, the genes and counts that the model continues, and their batches."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.aux_names import AuxNames
from transcriptformer.data.batches import Batch, BatchLimits, make_batches
from transcriptformer.data.reader import CellBlock
from transcriptformer.data.tokenize import Tokens
from transcriptformer.errors import CheckpointError, UsageError
from transcriptformer.generation.gene_names import gene_tokens
from transcriptformer.model.esm2ce import Esm2CE
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.vocab import AuxVocab

logger = logging.getLogger(__name__)

GeneCount: TypeAlias = str | tuple[str, float]
"""A gene id or symbol with its count, or without, which means 1."""

AuxValue: TypeAlias = str | Sequence[str | None] | None
"""Value of a metadata column for all prompts, or one per prompt; None means unknown."""


class Prompt(NamedTuple):
    """Genes in order, with their counts.

    Attributes
    ----------
    tokens
        Gene tokens (genes,), int64.
    counts
        Clipped counts (genes,), float32.
    """

    tokens: np.ndarray
    counts: np.ndarray

    def describe(self, names: np.ndarray) -> str:
        """Return `GENE=COUNT` of each gene, separated by blanks, given the names of tokens (tokens,)."""
        return " ".join(f"{names[token]}={count:g}" for token, count in zip(self.tokens, self.counts, strict=True))

    def followed_by(self, other: "Prompt") -> "Prompt":
        """Return a prompt with the genes of another one behind its own."""
        return Prompt(np.concatenate([self.tokens, other.tokens]), np.concatenate([self.counts, other.counts]))


def require_gene_head(checkpoint: Checkpoint) -> TranscriptFormer:
    """Return the model of a checkpoint that predicts its own genes.

    Raises
    ------
    UsageError
        If the model is the baseline, or its genes were replaced by those of a new species.
    CheckpointError
        If it was trained without a gene head.
    """
    inference = checkpoint.config.model.inference_config
    if isinstance(checkpoint.model, Esm2CE):
        raise UsageError("model.model_type esm2ce: the baseline predicts no genes; use transcriptformer")
    if inference.pretrained_embedding:
        raise UsageError("--pretrained-embedding: a new species has no gene head, so its genes have no probabilities")
    if checkpoint.model.gene_id_head is None:
        raise CheckpointError(f"{checkpoint.path}: has no gene head; it was trained with gene_id_loss_weight 0")
    return checkpoint.model


def longest_prompt(checkpoint: Checkpoint) -> int:
    """Return the maximum number of genes of a prompt, behind which the model predicts one more.

    Raises
    ------
    TranscriptFormerError
        If the checkpoint predicts no genes.
    """
    return require_gene_head(checkpoint).max_genes - 1


def parse_gene_count(text: str, option: str) -> tuple[str, float]:
    """Split `GENE=COUNT`, or `GENE` with count 1.

    Raises
    ------
    UsageError
        If the count is not a number.
    """
    gene, has_count, count = text.rpartition("=")
    if not has_count:
        return text, 1
    try:
        return gene, float(count)
    except ValueError as error:
        raise UsageError(f"{option} {text}: {count!r} is not a count; give GENE=COUNT or GENE") from error


def make_prompts(
    prompts: Sequence[Sequence[GeneCount]],
    checkpoint: Checkpoint,
    option: str = "prompts",
    max_genes: int | None = None,
) -> list[Prompt]:
    """Convert genes and counts to prompts; counts are clipped like those of cells.

    Parameters
    ----------
    prompts
        Genes of each prompt, in order; a prompt may be empty.
    option
        Option or argument that names them, for messages.
    max_genes
        Maximum number of genes; None: that of `longest_prompt`.

    Raises
    ------
    UsageError
        If a gene is unknown or occurs twice in a prompt, a count is not a whole number of at least 1, a prompt is too
        long, or the checkpoint was trained on scaled counts.
    """
    config = checkpoint.config.model
    if config.data_config.normalize_to_scale > 0:
        raise UsageError(
            f"{option}: the checkpoint was trained on counts scaled to a cell's total "
            "(model.data_config.normalize_to_scale), which a prompt does not have; use cells of a file"
        )
    max_genes = longest_prompt(checkpoint) if max_genes is None else max_genes
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise UsageError(f"{option}: each prompt must be a list of genes, not a text")
    pairs = [[(item, 1) if isinstance(item, str) else item for item in prompt] for prompt in prompts]
    offsets = np.concatenate([[0], np.cumsum([len(prompt) for prompt in pairs])]).astype(np.int64)
    tokens = gene_tokens([gene for prompt in pairs for gene, _ in prompt], checkpoint, option)
    counts = _whole_counts([pair for prompt in pairs for pair in prompt], option)
    n_clipped = int((counts > config.data_config.clip_counts).sum())
    if n_clipped:
        limit = config.data_config.clip_counts
        logger.info("%s: clipped %d of %d counts at %g, as in training", option, n_clipped, len(counts), limit)
    counts = np.minimum(counts, np.float32(config.data_config.clip_counts))
    made = [Prompt(tokens[start:stop], counts[start:stop]) for start, stop in pairwise(offsets)]
    names = checkpoint.gene_vocab.names()
    for number, prompt in enumerate(made, start=1):
        where = option if len(made) == 1 else f"{option}, prompt {number}"
        if len(prompt.tokens) > max_genes:
            raise UsageError(f"{where}: {len(prompt.tokens)} genes; the model takes at most {max_genes}")
        is_repeated = pd.Index(prompt.tokens).duplicated()
        if is_repeated.any():
            raise UsageError(f"{where}: gene {names[prompt.tokens[is_repeated][0]]} occurs twice")
    return made


def _whole_counts(pairs: Iterable[tuple[str, float]], option: str) -> np.ndarray:
    """Return the counts of genes (genes,), float32."""
    counts = list[float]()
    for gene, count in pairs:
        if not (isinstance(count, Real) and np.isfinite(count) and count >= 1 and count == round(count)):
            shown = f"{count:g}" if isinstance(count, Real) else repr(count)
            raise UsageError(f"{option}: count {shown} of {gene} is not a whole number of at least 1")
        counts.append(count)
    return np.array(counts, np.float32)


def aux_tokens(checkpoint: Checkpoint, n_prompts: int, values: Mapping[str, AuxValue]) -> np.ndarray:
    """Return auxiliary tokens (prompts, columns), int64, in the order of the checkpoint's columns.

    Values may be spelled as in files. Values outside the vocabulary count as unknown, with a warning that names the
    nearest known one.

    Parameters
    ----------
    values
        Value, or values per prompt, by column. Columns that are missing or None are unknown.

    Raises
    ------
    UsageError
        If the checkpoint lacks a column, or the number of values is not that of the prompts.
    """
    for column, value in values.items():
        if value is not None and column not in checkpoint.aux_vocabs:
            known = ", ".join(checkpoint.aux_vocabs) or "none"
            raise UsageError(f"{column}: the checkpoint was not trained with this metadata; its columns are: {known}")
    columns = [
        _tokens_of_column(vocab, n_prompts, values.get(column)) for column, vocab in checkpoint.aux_vocabs.items()
    ]
    return np.array(columns, np.int64).reshape(len(columns), n_prompts).T


def _tokens_of_column(vocab: AuxVocab, n_prompts: int, values: AuxValue) -> np.ndarray:
    if values is None or isinstance(values, str):
        values = [values] * n_prompts
    elif len(values) != n_prompts:
        raise UsageError(f"{vocab.column}: {len(values)} values for {n_prompts} prompts; give one, or one per prompt")
    texts = [None if pd.isna(value) else str(value) for value in values]
    names = AuxNames(vocab)
    for value in dict.fromkeys(text for text in texts if text is not None and text not in vocab.ids):
        found = names.find(value)
        if names.is_known(found):
            logger.info("%s %r taken as %r", vocab.column, value, found)
        else:
            nearest = names.nearest(value)
            hint = f"; nearest known: {nearest!r}" if nearest else ""
            logger.warning("unknown %s %r%s", vocab.column, value, hint)
    return vocab.lookup(pd.Series(texts, dtype=object), names.find)


def prompt_batches(
    prompts: Sequence[Prompt], aux_tokens: np.ndarray, checkpoint: Checkpoint, limits: BatchLimits
) -> Iterator[Batch]:
    """Yield batches of prompts of similar length, longest first; `rows` are indices of prompts.

    A batch has one position more than its longest prompt has genes, which predicts the next gene.

    Parameters
    ----------
    aux_tokens
        Auxiliary tokens (prompts, columns), from `aux_tokens`.
    """
    if not prompts:
        return
    genes, counts, lengths = (
        np.concatenate([prompt.tokens for prompt in prompts]).astype(np.int32),
        np.concatenate([prompt.counts for prompt in prompts]).astype(np.float32),
        [len(prompt.tokens) for prompt in prompts],
    )
    tokens = Tokens(genes, counts, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    block = CellBlock(np.arange(len(prompts)), tokens, aux_tokens)
    pad, seq_len = checkpoint.gene_vocab.pad, checkpoint.config.model.model_config.seq_len
    for batch in make_batches(block, limits, pad, seq_len):
        n_positions = int((batch.gene_tokens != pad).sum(1).max()) + 1  # padding would multiply the cost of short ones
        batch_genes, batch_counts = batch.gene_tokens[:, :n_positions], batch.gene_counts[:, :n_positions]
        yield batch._replace(gene_tokens=batch_genes.contiguous(), gene_counts=batch_counts.contiguous())
