"""One dataset over one or several files, its batches, and how cells are padded to a common length."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from transcriptformer.config import DataConfig
from transcriptformer.data.counts import read_counts
from transcriptformer.data.tokenize import Tokens, cells_to_keep, select_genes, tokenize, tokens_of_columns
from transcriptformer.errors import DataError
from transcriptformer.vocab import AuxVocab, GeneVocab

logger = logging.getLogger(__name__)

LENGTH_MULTIPLE = 16
"""Batches are padded to a multiple of this many positions: few shapes, little padding."""


class Batch(NamedTuple):
    """Cells as the model takes them; B cells, L positions, A auxiliary columns.

    Attributes
    ----------
    rows
        Where each cell stands in the dataset (B,), int64.
    gene_tokens
        (B, L), int64, [PAD] after a cell's last gene.
    gene_counts
        (B, L), float32, 0 after a cell's last gene.
    aux_tokens
        (B, A), int64.
    """

    rows: Tensor
    gene_tokens: Tensor
    gene_counts: Tensor
    aux_tokens: Tensor


@dataclass(frozen=True)
class CellStatistics:
    """What is worth telling about the cells of a dataset."""

    n_read: int
    """Cells in the files."""
    n_kept: int
    """Cells that passed the filters."""
    n_empty: int
    """Kept cells without any gene of the vocabulary."""
    n_too_long: int
    """Kept cells with more genes than the model has positions; the rest of their genes is not seen."""
    unknown_aux: dict[str, int]
    """Per auxiliary column, kept cells whose value is not in its vocabulary."""


class CellDataset(Dataset[Batch]):
    """The cells of one or several sources, in order, held in memory as ragged tokens.

    It is map-style and hands out whole batches: `dataset.__getitems__([3, 4, 5])` is a `Batch` of three cells, which
    is what a `DataLoader` with `collate_fn=as_is` asks for.

    Parameters
    ----------
    sources
        h5ad files or AnnData objects; filters look at each one by itself.
    gene_vocab, aux_vocabs
        Vocabularies of the checkpoint; `aux_vocabs` in the order of the auxiliary tokens.
    config
        How counts become tokens.
    seq_len
        Most genes of a cell.

    Attributes
    ----------
    obs
        Metadata of the cells that passed the filters, as found; several sources are concatenated.
    statistics
        How many cells were read, kept, empty, too long or of an unknown kind.

    Raises
    ------
    DataError
        If a source cannot be used, or no cell passes the filters.
    """

    def __init__(
        self,
        sources: Sequence[Path | anndata.AnnData],
        gene_vocab: GeneVocab,
        aux_vocabs: Mapping[str, AuxVocab],
        config: DataConfig,
        seq_len: int,
    ) -> None:
        self.pad, self.seq_len = gene_vocab.pad, seq_len
        parts = [_read_source(source, gene_vocab, aux_vocabs, config, seq_len) for source in sources]
        self.tokens = _concatenate([part.tokens for part in parts])
        self.aux_tokens = np.concatenate([part.aux_tokens for part in parts])
        self.obs = _concatenate_obs([part.obs for part in parts])
        self.statistics = CellStatistics(
            n_read=sum(part.n_read for part in parts),
            n_kept=len(self.obs),
            n_empty=int((self.tokens.lengths == 0).sum()),
            n_too_long=sum(part.n_too_long for part in parts),
            unknown_aux={
                column: int((self.aux_tokens[:, i] == vocab.unknown).sum())
                for i, (column, vocab) in enumerate(aux_vocabs.items())
            },
        )
        if len(self) == 0:
            raise DataError(
                f"no cell is left by the filters: {self.statistics.n_read} were read; see "
                f"model.data_config.filter_outliers={config.filter_outliers:g}, "
                f"min_expressed_genes={config.min_expressed_genes}"
            )
        n_repeated = int(self.obs.index.duplicated().sum())
        if n_repeated:
            logger.warning("%d cells bear a name that another one has; rows are in the order of the input", n_repeated)

    def __len__(self) -> int:
        return len(self.obs)

    def __getitem__(self, row: int) -> Batch:
        return self.__getitems__([row])

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        cells = np.asarray(rows, dtype=np.int64)
        genes, counts = pad_to_common_length(self.tokens.take(cells), self.pad, self.seq_len)
        return Batch(
            rows=torch.from_numpy(cells),
            gene_tokens=torch.from_numpy(genes),
            gene_counts=torch.from_numpy(counts),
            aux_tokens=torch.from_numpy(self.aux_tokens[cells]),
        )


def as_is(batch: Any) -> Any:
    """The `collate_fn` for a `CellDataset`, whose batches are complete."""
    return batch


def pad_to_common_length(tokens: Tokens, pad: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Gene tokens, int64, and counts, float32, as (cells, positions) arrays.

    There is room for the longest cell and one position more, for [START] moves every gene up by one; the number of
    positions is a multiple of `LENGTH_MULTIPLE`, or `seq_len` where that is less.
    """
    lengths = tokens.lengths
    longest = int(lengths.max(initial=0)) + 1
    width = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, seq_len)
    is_gene = np.arange(width) < lengths[:, None]  # (cells, positions)
    genes = np.full(is_gene.shape, pad, dtype=np.int64)
    counts = np.zeros(is_gene.shape, dtype=np.float32)
    genes[is_gene], counts[is_gene] = tokens.genes, tokens.counts
    return genes, counts


class _Source(NamedTuple):
    """One source, read, filtered and tokenized."""

    tokens: Tokens
    aux_tokens: np.ndarray
    obs: pd.DataFrame
    n_read: int
    n_too_long: int


def _read_source(
    source: Path | anndata.AnnData,
    gene_vocab: GeneVocab,
    aux_vocabs: Mapping[str, AuxVocab],
    config: DataConfig,
    seq_len: int,
) -> _Source:
    counts = read_counts(source, config.gene_col_name, config.use_raw, config.remove_duplicate_genes)
    column_tokens = tokens_of_columns(counts.gene_ids, gene_vocab, config.filter_to_vocabs, counts.name)
    selected = select_genes(counts, column_tokens)
    cells = cells_to_keep(selected, config.filter_outliers, config.min_expressed_genes)
    if len(cells) < len(counts.obs):
        selected = selected.take(cells)
    obs = counts.obs.iloc[cells]
    return _Source(
        tokens=tokenize(selected, config, seq_len, cells),
        aux_tokens=_aux_tokens(obs, aux_vocabs, counts.name),
        obs=obs,
        n_read=len(counts.obs),
        n_too_long=int((selected.lengths > seq_len).sum()),
    )


def _aux_tokens(obs: pd.DataFrame, vocabs: Mapping[str, AuxVocab], name: str) -> np.ndarray:
    """Auxiliary tokens (cells, columns), int64."""
    tokens = np.empty((len(obs), len(vocabs)), dtype=np.int64)
    for i, (column, vocab) in enumerate(vocabs.items()):
        if column in obs.columns:
            tokens[:, i] = vocab.lookup(obs[column])
        else:
            logger.warning("%s: obs has no column %r; its cells are taken as %r", name, column, "unknown")
            tokens[:, i] = vocab.unknown
    return tokens


def _concatenate(parts: Sequence[Tokens]) -> Tokens:
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([part.lengths for part in parts])
    return Tokens(
        np.concatenate([part.genes for part in parts]),
        np.concatenate([part.counts for part in parts]),
        np.concatenate([[0], np.cumsum(lengths)]),
    )


def _concatenate_obs(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join metadata; anndata's rules keep a categorical column categorical where the files' categories differ."""
    if len(parts) == 1:
        return parts[0]
    with anndata.settings.override(check_uniqueness=False):
        joined = anndata.concat([anndata.AnnData(obs=part) for part in parts], join="outer").obs
    for column in joined.select_dtypes(object):
        if joined[column].isna().any() and pd.api.types.infer_dtype(joined[column], skipna=True) == "string":
            joined[column] = pd.Categorical(joined[column])  # strings that only some files have
    return joined
