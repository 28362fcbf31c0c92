"""Reading blocks of cells from a source as tokens of a checkpoint's vocabularies."""

import logging
from collections import Counter
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd

from transcriptformer.config import DataConfig
from transcriptformer.data.aux_names import TERM_SUFFIX, AuxNames
from transcriptformer.data.metadata import BLOCK_SIZE
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


class AuxValues(NamedTuple):
    """Values of an auxiliary column of a source that are not entries of the vocabulary.

    Attributes
    ----------
    taken
        Value → entry of the vocabulary that it stands for.
    unknown
        Unknown value → number of cells; None stands for missing values.
    """

    taken: dict[str, str]
    unknown: dict[str | None, int]


MAX_LISTED = 5
"""Maximum number of unknown values in a log line."""


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
        symbols = source.genes.symbols
        unmapped = symbols.describe() if symbols is not None and symbols.unknown else None
        self.column_tokens = tokens_of_columns(
            *(source.gene_ids, gene_vocab, config.filter_to_vocabs, source.name, unmapped)
        )
        self.column_tokens[source.is_duplicate] = -1  # whose counts are dropped, or added to the first column
        self.aux_names = {column: AuxNames(vocab) for column, vocab in aux_vocabs.items()}

    def __len__(self) -> int:
        return len(self.source)

    def with_seed(self, seed: int) -> "CellReader":
        """Return a copy that shuffles genes with another seed, if it shuffles them."""
        reader = copy(self)
        reader.config = replace(self.config, seed=seed)
        return reader

    def aux_names_taken(self) -> dict[str, dict[str, str]]:
        """Return the names that values of auxiliary columns, in another spelling or as terms, were taken as."""
        return {column: values.taken for column, values in self.aux_values.items() if values.taken}

    @cached_property
    def aux_values(self) -> dict[str, AuxValues]:
        """Values of each auxiliary column that are not entries of its vocabulary."""
        return {column: self._aux_values(column) for column in self.aux_vocabs}

    def columns_of(self, column: str) -> list[str]:
        """Return the columns of `obs` with values of an auxiliary column: itself, then its ontology terms."""
        return [name for name in (column, column + TERM_SUFFIX) if name in self.source.obs.columns]

    def log_aux_values(self) -> None:
        """Log auxiliary columns that the source lacks, and values that are not entries of the vocabularies."""
        for column, (taken, unknown) in self.aux_values.items():
            if not self.columns_of(column):
                logger.warning("%s: obs has no column %r; using 'unknown' for all cells", self.source.name, column)
                continue
            for value, name in taken.items():
                logger.info("%s: %s %r taken as %r", self.source.name, column, value, name)
            named = [(value, n) for value, n in unknown.items() if value is not None]
            if named:
                more = f" and {len(named) - MAX_LISTED} more" if len(named) > MAX_LISTED else ""
                listed = [self._describe_unknown(column, value, n) for value, n in named[:MAX_LISTED]]
                logger.warning("%s: unknown %s: %s%s", self.source.name, column, ", ".join(listed), more)

    def _describe_unknown(self, column: str, value: str, n_cells: int) -> str:
        names = self.aux_names[column]
        name, nearest = names.term_name(value), names.nearest(value)
        notes = [name and repr(name), f"{n_cells} cells", nearest and f"nearest known: {nearest!r}"]
        return f"{value!r} ({', '.join(note for note in notes if note)})"

    def _aux_values(self, column: str) -> AuxValues:
        names, taken, unknown = self.aux_names[column], dict[str, str](), Counter[str | None]()
        columns = self.columns_of(column)
        for start in range(0, len(self) if columns else 0, BLOCK_SIZE):
            stop = min(start + BLOCK_SIZE, len(self))
            is_unknown, values = np.ones(stop - start, bool), np.full(stop - start, None, object)
            for source_column in columns:
                codes, distinct = pd.factorize(self.source.obs.rows(start, stop, [source_column])[source_column])
                texts = np.array([*map(str, distinct), None], object)
                found = [*map(names.find, texts[:-1])]
                is_known = np.array([*map(names.is_known, found), False])
                used = [code for code in np.unique(codes[is_unknown]) if is_known[code]]
                taken.update({texts[code]: found[code] for code in used if found[code] != texts[code]})
                values = np.where(pd.isna(values), texts[codes], values)
                is_unknown &= ~is_known[codes]
                if not is_unknown.any():
                    break
            unknown.update(Counter(values[is_unknown].tolist()))
        return AuxValues(taken, {value: n for value, n in unknown.most_common() if value not in names.vocab.ids})

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
        """Return auxiliary tokens (cells, columns), int64.

        They are those of the columns of the same names or, for cells with an unknown value, of their ontology terms.
        """
        tokens = np.tile(np.array([vocab.unknown for vocab in self.aux_vocabs.values()], np.int64), (stop - start, 1))
        for suffix in ("", TERM_SUFFIX):
            columns = [
                (i, vocab, vocab.column + suffix)
                for i, vocab in enumerate(self.aux_vocabs.values())
                if vocab.column + suffix in self.source.obs.columns and (tokens[:, i] == vocab.unknown).any()
            ]
            if not columns:
                continue
            obs = self.source.obs.rows(start, stop, [name for _, _, name in columns])
            for i, vocab, name in columns:
                found = vocab.lookup(obs[name], self.aux_names[vocab.column].find)
                tokens[:, i] = np.where(tokens[:, i] == vocab.unknown, found, tokens[:, i])
        return tokens
