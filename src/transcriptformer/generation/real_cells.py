"""Cells of a file or AnnData as the model sees them, their genes in a random order."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import anndata
import numpy as np
import pandas as pd

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.reader import CellReader
from transcriptformer.data.source import open_source
from transcriptformer.data.tokenize import Tokens, tokenize
from transcriptformer.errors import UsageError

Source: TypeAlias = str | Path | anndata.AnnData


class Cells(NamedTuple):
    """Consecutive cells of a source.

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


def open_cells(source: Source, checkpoint: Checkpoint, seed: int) -> CellReader:
    """Open a source; the genes of each cell are shuffled, as in training, unless the model was trained on sorted ones.

    Raises
    ------
    TranscriptFormerError
        If it cannot be used.
    """
    model = checkpoint.config.model
    config = replace(
        model.data_config, filter_to_vocabs=True, randomize_genes=not model.data_config.sort_genes, seed=seed
    )
    opened = open_source(source, config, checkpoint.gene_vocab, model.inference_config.oom_dataloader)
    seq_len = model.model_config.seq_len
    reader = CellReader(opened, checkpoint.gene_vocab, checkpoint.aux_vocabs, config, seq_len)
    reader.log_aux_values()
    return reader


def read_cells(reader: CellReader, max_genes: int) -> Iterator[Cells]:
    """Read all cells in blocks, each cell truncated to `max_genes`."""
    for start in range(0, len(reader), reader.config.block_size):
        stop = min(start + reader.config.block_size, len(reader))
        expressed = reader.selected_genes(start, stop)
        tokens = tokenize(expressed, reader.config, max_genes, np.arange(start, stop))
        names = reader.source.obs.rows(start, stop, []).index
        yield Cells(names, expressed, tokens, reader.aux_tokens(start, stop))


def read_all_cells(reader: CellReader) -> Cells:
    """Read all cells at once, with as many genes as the model takes."""
    names, expressed, tokens, aux_tokens = zip(*read_cells(reader, reader.seq_len), strict=True)
    joined = names[0].append(list(names[1:]))
    return Cells(joined, Tokens.join(expressed), Tokens.join(tokens), np.concatenate(aux_tokens))
