"""Tokenization of counts, as pure functions on CSR arrays and ragged rows, without densifying any matrix."""

import logging
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from scipy import sparse

from transcriptformer.config import DataConfig
from transcriptformer.data.species import likely_species, looks_like_gene_ids, species_of
from transcriptformer.errors import DataError
from transcriptformer.vocab import GeneVocab

logger = logging.getLogger(__name__)

LOW_COVERAGE = 0.1
"""Warn if less than this fraction of a file's genes is in the vocabulary."""


class Tokens(NamedTuple):
    """Ragged rows of tokens; cell i has the entries `offsets[i]:offsets[i + 1]`.

    Attributes
    ----------
    genes
        Gene tokens (entries,), int32.
    counts
        Counts of the genes (entries,), float32.
    offsets
        Offsets of the cells (cells + 1,), int64.
    """

    genes: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Number of entries of each cell (cells,)."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """Cell index of each entry (entries,)."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    def totals(self) -> np.ndarray:
        """Return the total count of each cell (cells,), float64."""
        return np.bincount(self.rows, weights=self.counts, minlength=len(self.offsets) - 1)

    def keep(self, entries: np.ndarray) -> "Tokens":
        """Keep the entries where the mask `entries` (entries,) is true; cells may become empty."""
        kept = np.flatnonzero(entries)  # taking indices is several times faster than boolean indexing
        return Tokens(self.genes.take(kept), self.counts.take(kept), np.searchsorted(kept, self.offsets))

    def reorder(self, order: np.ndarray) -> "Tokens":
        """Permute the entries by `order` (entries,), which must keep every entry within its cell."""
        return Tokens(self.genes.take(order), self.counts.take(order), self.offsets)

    def take(self, cells: np.ndarray) -> "Tokens":
        """Return the rows of `cells`, an array of indices, in that order."""
        starts = self.offsets[cells]
        lengths = self.offsets[cells + 1] - starts
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        entries = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Tokens(self.genes.take(entries), self.counts.take(entries), offsets)

    @classmethod
    def join(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """Concatenate the cells of `parts`."""
        genes, counts, lengths = (
            np.concatenate(arrays)
            for arrays in zip(*((part.genes, part.counts, part.lengths) for part in parts), strict=True)
        )
        return cls(genes, counts, np.concatenate([[0], np.cumsum(lengths)]))


def tokens_of_columns(
    gene_ids: np.ndarray, vocab: GeneVocab, filter_to_vocabs: bool, name: str, unmapped: str | None = None
) -> np.ndarray:
    """Return the token of each column (genes,), int32; -1 for columns to drop.

    Parameters
    ----------
    unmapped
        Description of the symbols that a map lacks, if the ids come from symbols.

    Raises
    ------
    DataError
        If none of the genes is in the vocabulary.
    """
    tokens = vocab.lookup(gene_ids)
    found = int((tokens >= 0).sum())
    if found == 0:
        raise DataError(
            f"{name}: none of its {len(gene_ids)} genes is in the checkpoint's "
            f"{_describe_mismatch(gene_ids, vocab, unmapped)}"
        )
    if found < LOW_COVERAGE * len(tokens):
        share = f"{found} of {len(tokens)} genes ({100 * found / len(tokens):.1f} %)"
        mismatch = _describe_mismatch(gene_ids, vocab, unmapped)
        logger.warning("%s: only %s are in the checkpoint's %s", name, share, mismatch)
    if not filter_to_vocabs:
        tokens[tokens < 0] = vocab.unknown
    return tokens.astype(np.int32)


def _describe_mismatch(gene_ids: np.ndarray, vocab: GeneVocab, unmapped: str | None) -> str:
    """Return the first gene ids of the file and of the vocabulary, and the likely cause of the mismatch."""
    if unmapped is not None:
        return f"vocabulary: {unmapped}; map the symbols to ids with --gene-map"
    gene_ids = gene_ids[gene_ids != ""]
    ours, theirs = (", ".join(islice(genes, 3)) or "none" for genes in (vocab.genes, gene_ids))
    kinds = [looks_like_gene_ids(genes) for genes in (vocab.genes, gene_ids)]
    species = likely_species(gene_ids)
    advice = (
        "these look like gene symbols: map them to ids with --gene-map"
        if kinds == [True, False]
        else f"the cells may be of another species{f' ({species})' if species else ''}, or the checkpoint is the wrong "
        f"one; for a new species, {_pretrained_advice(species, vocab)}"
    )
    return f"vocabulary: the file has {theirs}, …; the vocabulary has {ours}, …; {advice}"


def _pretrained_advice(species: str | None, vocab: GeneVocab) -> str:
    """Return what to do about genes of a species that the vocabulary lacks."""
    if species is None or species in map(species_of, vocab.genes):
        return "add --pretrained-embedding"
    file = f"checkpoints/all_embeddings/{species}_gene.h5"
    return f"run 'transcriptformer download all-embeddings', then add --pretrained-embedding {file}"


def select_genes(counts: sparse.csr_array, column_tokens: np.ndarray) -> Tokens:
    """Convert counts to tokens in column order, dropping columns whose token is -1."""
    tokens = Tokens(column_tokens.take(counts.indices), counts.data, counts.indptr.astype(np.int64))
    return tokens if (column_tokens >= 0).all() else tokens.keep(tokens.genes >= 0)


def cells_to_keep(
    lengths: np.ndarray, totals: np.ndarray, filter_outliers: float, min_expressed_genes: int
) -> np.ndarray:
    """Return the mask (cells,) of the cells of a file that pass both filters.

    Parameters
    ----------
    lengths
        Number of selected genes of each cell (cells,).
    totals
        Total raw count of these genes (cells,), float64.
    filter_outliers
        Keep totals strictly within this many standard deviations of the mean total; 0 keeps all.
    min_expressed_genes
        Keep cells with at least this many genes.
    """
    keep = lengths >= min_expressed_genes
    if filter_outliers > 0:
        keep &= np.abs(totals - totals.mean()) < filter_outliers * totals.std()
    return keep


def tokenize(tokens: Tokens, config: DataConfig, seq_len: int, cell_indices: np.ndarray) -> Tokens:
    """Order, truncate, normalize and clip the selected genes of each cell, as in training.

    Parameters
    ----------
    tokens
        Selected genes in column order, with raw counts.
    seq_len
        Maximum number of genes per cell; normalization uses only the counts of these.
    cell_indices
        Index of each cell in its file (cells,), which seeds the shuffle.
    """
    tokens = truncate(order_genes(tokens, config, cell_indices), seq_len)
    counts = tokens.counts
    if config.normalize_to_scale > 0:
        counts = counts / tokens.totals().astype(np.float32)[tokens.rows] * np.float32(config.normalize_to_scale)
    return tokens._replace(counts=np.minimum(counts, np.float32(config.clip_counts)))


def order_genes(tokens: Tokens, config: DataConfig, cell_indices: np.ndarray) -> Tokens:
    """Sort the genes of each cell by descending count, shuffle them, or keep the column order."""
    if config.sort_genes:
        return tokens.reorder(np.lexsort((-tokens.counts, tokens.rows)))  # stable: ties stay in column order
    if config.randomize_genes:
        return tokens.reorder(_shuffle(tokens.offsets, config.seed, cell_indices))
    return tokens


def truncate(tokens: Tokens, seq_len: int) -> Tokens:
    """Keep the first `seq_len` genes of each cell."""
    if tokens.lengths.max(initial=0) <= seq_len:
        return tokens
    position = np.arange(len(tokens.genes)) - np.repeat(tokens.offsets[:-1], tokens.lengths)
    return tokens.keep(position < seq_len)


def _shuffle(offsets: np.ndarray, seed: int, cell_indices: np.ndarray) -> np.ndarray:
    order = np.arange(offsets[-1])
    for cell, start, end in zip(cell_indices, offsets[:-1], offsets[1:], strict=True):
        np.random.default_rng([seed, int(cell)]).shuffle(order[start:end])
    return order
