"""A source of cells, aligned with the vocabularies of a checkpoint: blocks of cells come out as tokens."""

import logging
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from transcriptformer.config import DataConfig
from transcriptformer.data.source import CellSource
from transcriptformer.data.tokenize import Tokens, order_genes, select_genes, shorten, tokenize, tokens_of_columns
from transcriptformer.vocab import AuxVocab, GeneVocab

logger = logging.getLogger(__name__)


class CellBlock(NamedTuple):
    """Consecutive cells as tokens, on their way from the process that reads to the one that computes.

    Attributes
    ----------
    rows
        Where each cell stands among the kept cells (cells,), int64.
    tokens
        Their genes and counts, ragged.
    aux_tokens
        (cells, columns), int64.
    """

    rows: np.ndarray
    tokens: Tokens
    aux_tokens: np.ndarray


class CellReader:
    """Reads the cells of one source, a block of consecutive ones at a time.

    Parameters
    ----------
    source
        Where the cells come from.
    gene_vocab, aux_vocabs
        Vocabularies of the checkpoint; `aux_vocabs` in the order of the auxiliary tokens.
    config
        How counts become tokens.
    seq_len
        Most genes of a cell.

    Raises
    ------
    DataError
        If none of its genes is in the vocabulary.
    """

    def __init__(
        self,
        source: CellSource,
        gene_vocab: GeneVocab,
        aux_vocabs: Mapping[str, AuxVocab],
        config: DataConfig,
        seq_len: int,
    ) -> None:
        self.source, self.aux_vocabs, self.config, self.seq_len = source, aux_vocabs, config, seq_len
        self.column_tokens = tokens_of_columns(source.gene_ids, gene_vocab, config.filter_to_vocabs, source.name)
        self.column_tokens[source.is_repeated] = -1
        self.aux_columns = [column for column in aux_vocabs if column in source.obs.columns]

    def __len__(self) -> int:
        return len(self.source)

    def with_seed(self, seed: int) -> "CellReader":
        """The same cells, with their genes shuffled by another seed if they are shuffled."""
        reader = copy(self)
        reader.config = replace(self.config, seed=seed)
        return reader

    def tell_of_missing_columns(self) -> None:
        """Warn of auxiliary columns that the source does not have."""
        for column in self.aux_vocabs:
            if column not in self.aux_columns:
                logger.warning("%s: obs has no column %r; its cells are taken as 'unknown'", self.source.name, column)

    def selected_genes(self, start: int, stop: int) -> Tokens:
        """Genes of the vocabulary that the cells from `start` to before `stop` express, with their counts as read."""
        return select_genes(self.source.counts(start, stop), self.column_tokens)

    def block(self, start: int, cells: np.ndarray, rows: np.ndarray) -> CellBlock:
        """Read `cells`, indices in the source (cells,), ascending, of a block that begins at `start`.

        Parameters
        ----------
        rows
            Where each of them stands among the kept cells (cells,).
        """
        aux_tokens = self.aux_tokens(start, int(cells[-1]) + 1)[cells - start]
        return CellBlock(rows, self.tokens(start, cells), aux_tokens)

    def tokens(self, start: int, cells: np.ndarray) -> Tokens:
        """Tokens of `cells`, indices in the source (cells,), ascending, of a block that begins at `start`."""
        stop = int(cells[-1]) + 1
        selected = self.selected_genes(start, stop)
        if len(cells) < stop - start:
            selected = selected.take(cells - start)
        return tokenize(selected, self.config, self.seq_len, cells)

    def counts_seen(self, selected: Tokens, start: int) -> np.ndarray:
        """Sum of counts of each cell (cells,) that the model sees: those of its first `seq_len` genes."""
        cells = start + np.arange(len(selected.lengths))
        return shorten(order_genes(selected, self.config, cells), self.seq_len).totals()

    def aux_tokens(self, start: int, stop: int) -> np.ndarray:
        """Auxiliary tokens (cells, columns), int64; `unknown` where the source has no such column."""
        tokens = np.empty((stop - start, len(self.aux_vocabs)), dtype=np.int64)
        obs = self.source.obs.rows(start, stop, self.aux_columns)
        for i, (column, vocab) in enumerate(self.aux_vocabs.items()):
            tokens[:, i] = vocab.lookup(obs[column]) if column in self.aux_columns else vocab.unknown
        return tokens
