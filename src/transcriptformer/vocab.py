"""Vocabularies, which map gene ids and cell metadata to token ids."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import pandas as pd

from transcriptformer.errors import CheckpointError

UNKNOWN, START, END = "unknown", "[START]", "[END]"


@dataclass(frozen=True)
class GeneVocab:
    """Gene vocabulary: the special tokens, followed by the genes.

    Attributes
    ----------
    special_tokens
        Names of the special tokens, whose ids are 0, 1, ….
    genes
        Gene id → token, starting at `len(special_tokens)`.
    pad_token
        Name of the padding token.
    """

    special_tokens: tuple[str, ...]
    genes: dict[str, int]
    pad_token: str = "[PAD]"

    def __len__(self) -> int:
        return len(self.special_tokens) + len(self.genes)

    def names(self) -> np.ndarray:
        """Return the name of each token (tokens,): special tokens, then gene ids."""
        return np.array([*self.special_tokens, *self.genes], dtype=object)

    def lookup(self, gene_ids: np.ndarray) -> np.ndarray:
        """Map `gene_ids` (n,) to tokens, int64; -1 for genes outside the vocabulary."""
        return np.fromiter(map(self.genes.get, gene_ids, repeat(-1)), dtype=np.int64, count=len(gene_ids))

    @property
    def pad(self) -> int:
        """Padding token."""
        return self.special_token(self.pad_token)

    @property
    def start(self) -> int:
        """Token that precedes a cell's first gene."""
        return self.special_token(START)

    @property
    def end(self) -> int:
        """Target of the last position of a cell that fills the whole sequence."""
        return self.special_token(END)

    @property
    def unknown(self) -> int:
        """Token of out-of-vocabulary genes, if they are not dropped."""
        return self.special_token(UNKNOWN)

    def special_token(self, name: str) -> int:
        """Return the token of a special token, by name."""
        if name not in self.special_tokens:
            raise CheckpointError(f"config.json: model.data_config.special_tokens lacks {name!r}")
        return self.special_tokens.index(name)


@dataclass(frozen=True)
class AuxVocab:
    """Vocabulary of one column of cell metadata, such as the assay."""

    column: str
    ids: dict[str, int]
    unknown: int

    def __len__(self) -> int:
        return max(self.ids.values()) + 1

    def lookup(self, values: pd.Series, find: Callable[[str], str] = str) -> np.ndarray:
        """Map `values` (n,) to tokens, int64; `unknown` for values outside the vocabulary.

        Parameters
        ----------
        find
            Returns the entry of the vocabulary that a value stands for.
        """
        codes, distinct = pd.factorize(values)  # one look-up per distinct value; missing values have code -1
        tokens = np.array([self.ids.get(find(str(value)), self.unknown) for value in distinct] + [self.unknown])
        return tokens[codes].astype(np.int64)


def make_gene_vocab(gene_ids: Iterable[str], special_tokens: Sequence[str], pad_token: str) -> GeneVocab:
    """Number `gene_ids` after the special tokens; duplicate genes keep their first token."""
    genes = {gene: token for token, gene in enumerate(dict.fromkeys(gene_ids), start=len(special_tokens))}
    return GeneVocab(tuple(special_tokens), genes, pad_token)


def make_aux_vocab(column: str, values: Iterable[str], unknown: str) -> AuxVocab:
    """Number `unknown`, then the other `values`."""
    return AuxVocab(column, {value: i for i, value in enumerate(dict.fromkeys([unknown, *values]))}, 0)
