"""Reading blocks of cells from a source as tokens of a checkpoint's vocabularies."""

import logging
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from transcriptformer.config import DataConfig
from transcriptformer.data.source import CellSource
from transcriptformer.data.tokenize import Tokens, order_genes, select_genes, tokenize, tokens_of_columns, truncate
from transcriptformer.vocab import AuxVocab, GeneVocab

logger = logging.getLogger(__name__)


class CellBlock(NamedTuple):
    """Tokens of a block of cells, as sent from worker processes to the main process.

    Attributes
    ----------
    rows
        Index of each cell among the kept cells (cells,), int64.
    tokens
        Genes and counts, ragged.
    aux_tokens
        (cells, columns), int64.
    """

    rows: np.ndarray
    tokens: Tokens
    aux_tokens: np.ndarray


class CellReader:
    """Reader that tokenizes the cells of one source in blocks of consecutive cells.

    Parameters
    ----------
    source
        Source of the cells.
    gene_vocab, aux_vocabs
        Vocabularies of the checkpoint; `aux_vocabs` in the order of the auxiliary tokens.
    config
        Tokenization settings.
    seq_len
        Maximum number of genes per cell.

    Raises
    ------
    DataError
        If none of the source's genes is in the vocabulary.
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
        self.column_tokens[source.is_duplicate] = -1  # whose counts are dropped, or added to the first column
        self.aux_columns = [column for column in aux_vocabs if column in source.obs.columns]

    def __len__(self) -> int:
        return len(self.source)

    def with_seed(self, seed: int) -> "CellReader":
        """Return a copy that shuffles genes with another seed, if it shuffles them."""
        reader = copy(self)
        reader.config = replace(self.config, seed=seed)
        return reader

    def warn_of_missing_columns(self) -> None:
        """Warn of auxiliary columns that the source lacks."""
        for column in self.aux_vocabs:
            if column not in self.aux_columns:
                logger.warning("%s: obs has no column %r; using 'unknown' for all cells", self.source.name, column)

    def selected_genes(self, start: int, stop: int) -> Tokens:
        """Return the in-vocabulary genes that cells `start:stop` express, with unmodified counts."""
        return select_genes(self.source.counts(start, stop), self.column_tokens)

    def block(self, start: int, cells: np.ndarray, rows: np.ndarray) -> CellBlock:
        """Read `cells`, ascending indices in the source (cells,), of the block that begins at `start`.

        Parameters
        ----------
        rows
            Index of each cell among the kept cells (cells,).
        """
        aux_tokens = self.aux_tokens(start, int(cells[-1]) + 1)[cells - start]
        return CellBlock(rows, self.tokens(start, cells), aux_tokens)

    def tokens(self, start: int, cells: np.ndarray) -> Tokens:
        """Tokenize `cells`, ascending indices in the source (cells,), of the block that begins at `start`."""
        stop = int(cells[-1]) + 1
        selected = self.selected_genes(start, stop)
        if len(cells) < stop - start:
            selected = selected.take(cells - start)
        return tokenize(selected, self.config, self.seq_len, cells)

    def counts_seen(self, selected: Tokens, start: int) -> np.ndarray:
        """Return the total count of each cell (cells,) over the `seq_len` genes that the model sees."""
        cells = start + np.arange(len(selected.lengths))
        return truncate(order_genes(selected, self.config, cells), self.seq_len).totals()

    def aux_tokens(self, start: int, stop: int) -> np.ndarray:
        """Return auxiliary tokens (cells, columns), int64; `unknown` for columns that the source lacks."""
        tokens = np.empty((stop - start, len(self.aux_vocabs)), dtype=np.int64)
        obs = self.source.obs.rows(start, stop, self.aux_columns)
        for i, (column, vocab) in enumerate(self.aux_vocabs.items()):
            tokens[:, i] = vocab.lookup(obs[column]) if column in self.aux_columns else vocab.unknown
        return tokens
