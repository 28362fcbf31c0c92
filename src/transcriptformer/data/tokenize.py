"""Counts become tokens: pure functions on CSR arrays and on ragged rows; no matrix is ever made dense."""

import logging
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from scipy import sparse

from transcriptformer.config import DataConfig
from transcriptformer.data.source import looks_like_gene_ids
from transcriptformer.data.species import likely_species
from transcriptformer.errors import DataError
from transcriptformer.vocab import GeneVocab

logger = logging.getLogger(__name__)

LOW_COVERAGE = 0.1
"""Below this share of a file's genes in the vocabulary, something is likely to be wrong: warn."""


class Tokens(NamedTuple):
    """Ragged rows: cell i owns the entries `offsets[i]:offsets[i + 1]`.

    Attributes
    ----------
    genes
        Gene tokens (entries,), int32.
    counts
        Their counts (entries,), float32.
    offsets
        (cells + 1,), int64.
    """

    genes: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Entries of each cell (cells,)."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """Cell of each entry (entries,)."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    def totals(self) -> np.ndarray:
        """Sum of counts of each cell (cells,), float64."""
        return np.bincount(self.rows, weights=self.counts, minlength=len(self.offsets) - 1)

    def keep(self, entries: np.ndarray) -> "Tokens":
        """Only the entries where the mask `entries` (entries,) is true; every cell stays."""
        kept = np.flatnonzero(entries)  # taking indices is several times faster than indexing by a mask
        return Tokens(self.genes.take(kept), self.counts.take(kept), np.searchsorted(kept, self.offsets))

    def reorder(self, order: np.ndarray) -> "Tokens":
        """Entries in another order (entries,), which must keep every entry within its cell."""
        return Tokens(self.genes.take(order), self.counts.take(order), self.offsets)

    def take(self, cells: np.ndarray) -> "Tokens":
        """The rows of `cells`, an array of indices, in that order."""
        starts = self.offsets[cells]
        lengths = self.offsets[cells + 1] - starts
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        entries = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Tokens(self.genes.take(entries), self.counts.take(entries), offsets)

    @classmethod
    def join(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """The cells of `parts`, one after the other."""
        genes, counts, lengths = (
            np.concatenate(arrays)
            for arrays in zip(*((part.genes, part.counts, part.lengths) for part in parts), strict=True)
        )
        return cls(genes, counts, np.concatenate([[0], np.cumsum(lengths)]))


def tokens_of_columns(gene_ids: np.ndarray, vocab: GeneVocab, filter_to_vocabs: bool, name: str) -> np.ndarray:
    """Token of each column (genes,), int32; -1 where the column is to be dropped.

    Raises
    ------
    DataError
        If none of the genes is in the vocabulary.
    """
    tokens = vocab.lookup(gene_ids)
    found = int((tokens >= 0).sum())
    if found == 0:
        raise DataError(f"{name}: none of its {len(gene_ids)} genes is in the checkpoint's {_compare(gene_ids, vocab)}")
    if found < LOW_COVERAGE * len(tokens):
        share = f"{found} of {len(tokens)} genes ({100 * found / len(tokens):.1f} %)"
        logger.warning("%s: only %s are in the checkpoint's %s", name, share, _compare(gene_ids, vocab))
    if not filter_to_vocabs:
        tokens[tokens < 0] = vocab.unknown
    return tokens.astype(np.int32)


def _compare(gene_ids: np.ndarray, vocab: GeneVocab) -> str:
    """Both sides' first gene ids, and what is likely to be wrong."""
    ours, theirs = (", ".join(islice(genes, 3)) for genes in (vocab.genes, gene_ids))
    kinds = [looks_like_gene_ids(genes) for genes in (vocab.genes, gene_ids)]
    species = likely_species(gene_ids)
    advice = (
        "these look like gene symbols: name a column of var with Ensembl ids by --gene-col-name"
        if kinds == [True, False]
        else f"is it another species{f' ({species})' if species else ''}, or a checkpoint for other genes? "
        "--pretrained-embedding brings the genes of a new species"
    )
    return f"vocabulary: the file has {theirs}, …; the vocabulary has {ours}, …; {advice}"


def select_genes(counts: sparse.csr_array, column_tokens: np.ndarray) -> Tokens:
    """Replace columns by tokens and drop the columns whose token is -1; column order stays."""
    tokens = Tokens(column_tokens.take(counts.indices), counts.data, counts.indptr.astype(np.int64))
    return tokens if (column_tokens >= 0).all() else tokens.keep(tokens.genes >= 0)


def cells_to_keep(
    lengths: np.ndarray, totals: np.ndarray, filter_outliers: float, min_expressed_genes: int
) -> np.ndarray:
    """Mask (cells,) of the cells that pass both filters, which look at the whole file.

    Parameters
    ----------
    lengths
        Genes of each cell (cells,), once genes are selected.
    totals
        Sum of their counts as read (cells,), float64.
    filter_outliers
        Keep totals strictly within this many standard deviations of the mean total; 0: all.
    min_expressed_genes
        Keep cells with at least this many genes.
    """
    keep = lengths >= min_expressed_genes
    if filter_outliers > 0:
        keep &= np.abs(totals - totals.mean()) < filter_outliers * totals.std()
    return keep


def tokenize(tokens: Tokens, config: DataConfig, seq_len: int, cell_indices: np.ndarray) -> Tokens:
    """Order, shorten, scale and clip the selected genes of each cell, as the model was trained to see them.

    Parameters
    ----------
    tokens
        Selected genes in column order, counts as read.
    seq_len
        Most genes of a cell; scaling looks at the counts of these alone.
    cell_indices
        Number of each cell in its file (cells,): seeds the shuffle, so that it depends on nothing else.
    """
    tokens = shorten(order_genes(tokens, config, cell_indices), seq_len)
    counts = tokens.counts
    if config.normalize_to_scale > 0:
        counts = counts / tokens.totals().astype(np.float32)[tokens.rows] * np.float32(config.normalize_to_scale)
    return tokens._replace(counts=np.minimum(counts, np.float32(config.clip_counts)))


def order_genes(tokens: Tokens, config: DataConfig, cell_indices: np.ndarray) -> Tokens:
    """Genes of each cell in column order, by count, or shuffled."""
    if config.sort_genes:
        return tokens.reorder(np.lexsort((-tokens.counts, tokens.rows)))  # stable: ties stay in column order
    if config.randomize_genes:
        return tokens.reorder(_shuffle(tokens.offsets, config.seed, cell_indices))
    return tokens


def shorten(tokens: Tokens, seq_len: int) -> Tokens:
    """The first `seq_len` genes of each cell."""
    if tokens.lengths.max(initial=0) <= seq_len:
        return tokens
    position = np.arange(len(tokens.genes)) - np.repeat(tokens.offsets[:-1], tokens.lengths)
    return tokens.keep(position < seq_len)


def _shuffle(offsets: np.ndarray, seed: int, cell_indices: np.ndarray) -> np.ndarray:
    order = np.arange(offsets[-1])
    for cell, start, end in zip(cell_indices, offsets[:-1], offsets[1:], strict=True):
        np.random.default_rng([seed, int(cell)]).shuffle(order[start:end])
    return order
