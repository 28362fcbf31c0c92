"""Cells of a file or AnnData as the model sees them, their genes in a random order."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import anndata
import numpy as np
import pandas as pd

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.config import DataConfig
from transcriptformer.data.reader import CellReader
from transcriptformer.data.source import CellSource, open_source
from transcriptformer.data.survey import Survey, survey_cells
from transcriptformer.data.tokenize import Tokens, tokenize
from transcriptformer.errors import UsageError
from transcriptformer.generation.prompts import aux_tokens

logger = logging.getLogger(__name__)

Source: TypeAlias = str | Path | anndata.AnnData


class Cells(NamedTuple):
    """Some cells of a source, in its order.

    Attributes
    ----------
    names
        Names of the cells (cells,).
    expressed
        Genes of the vocabulary that the cells express, in column order, with unmodified counts.
    tokens
        The same as the model takes them: in order, truncated and clipped.
    aux_tokens
        Auxiliary tokens (cells, columns), int64.
    """

    names: pd.Index
    expressed: Tokens
    tokens: Tokens
    aux_tokens: np.ndarray


def require_counts(checkpoint: Checkpoint) -> None:
    """Raise UsageError if the model was trained on scaled counts, and thus predicts none."""
    if checkpoint.config.model.data_config.normalize_to_scale > 0:
        raise UsageError(
            "model.data_config.normalize_to_scale: the checkpoint was trained on scaled counts, and predicts none"
        )


class RealCells(NamedTuple):
    """The cells of an open source.

    Attributes
    ----------
    reader
        Reader, which knows the maximum number of genes per cell.
    survey
        Statistics of all cells, and which of them passed the filters.
    given_aux
        Auxiliary tokens that replace those of all cells (columns,); -1 where there are none.
    """

    reader: CellReader
    survey: Survey
    given_aux: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Number of genes of each cell that passed the filters, at most as many as are read (cells,)."""
        return np.minimum(self.survey.lengths[self.survey.kept], self.reader.seq_len)

    def blocks(self, chosen: np.ndarray | None = None) -> Iterator[Cells]:
        """Read cells in blocks: chosen ones, by ascending indices in the source, or those that passed the filters."""
        chosen = np.flatnonzero(self.survey.kept) if chosen is None else chosen
        reader, size = self.reader, self.reader.config.block_size
        for start in range(0, len(reader), size):
            cells = chosen[(chosen >= start) & (chosen < start + size)]
            if not len(cells):
                continue
            stop, here = int(cells[-1]) + 1, cells - start
            names = reader.source.obs.rows(start, stop, []).index[here]
            expressed = reader.selected_genes(start, stop).take(here)
            aux = np.where(self.given_aux >= 0, self.given_aux, reader.aux_tokens(start, stop)[here])
            yield Cells(names, expressed, tokenize(expressed, reader.config, reader.seq_len, cells), aux)


@contextmanager
def opened_cells(
    source: Source,
    checkpoint: Checkpoint,
    seed: int,
    max_genes: int,
    metadata: Mapping[str, str | None] | None = None,
    option: str = "--data-file",
) -> Iterator[RealCells]:
    """Open a source and survey its cells.

    The genes of each cell are shuffled, as in training, unless the model was trained on sorted ones.

    Parameters
    ----------
    max_genes
        Maximum number of genes per cell.
    metadata
        Values of metadata columns, which replace those of the source unless None.
    option
        Option that names the source, for messages.

    Raises
    ------
    TranscriptFormerError
        If the source or the metadata cannot be used.
    """
    model, metadata = checkpoint.config.model, metadata or {}
    is_given = [metadata.get(column) is not None for column in checkpoint.aux_vocabs]
    given_aux = np.where(is_given, aux_tokens(checkpoint, 1, metadata)[0], -1)
    config = replace(
        model.data_config, filter_to_vocabs=True, randomize_genes=not model.data_config.sort_genes, seed=seed
    )
    opened = _open(source, checkpoint, config, option)
    try:
        reader = CellReader(opened, checkpoint.gene_vocab, checkpoint.aux_vocabs, config, max_genes)
        survey = survey_cells([reader], config)
        if survey.n_kept < survey.n_read:
            logger.info("%s: the filters removed %d cells", opened.name, survey.n_read - survey.n_kept)
        if n_cut := survey.n_too_long(max_genes):
            logger.info("%s: %d cells cut to %d of their genes", opened.name, n_cut, max_genes)
        yield RealCells(reader, survey, given_aux)
    finally:
        opened.close()


def count_cells(source: Source, checkpoint: Checkpoint, option: str) -> int:
    """Return the number of cells of a source, whether they pass the filters or not."""
    opened = _open(source, checkpoint, checkpoint.config.model.data_config, option)
    try:
        return len(opened)
    finally:
        opened.close()


def _open(source: Source, checkpoint: Checkpoint, config: DataConfig, option: str) -> CellSource:
    in_memory = checkpoint.config.model.inference_config.oom_dataloader
    try:
        return open_source(source, config, checkpoint.gene_vocab, in_memory)
    except UsageError as error:  # which names the option of other commands
        raise UsageError(str(error).replace("--data-file", option, 1)) from error
