"""Cells of a file as prompts, in groups."""

import logging
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.reader import CellReader
from transcriptformer.data.source import open_source
from transcriptformer.data.survey import survey_cells
from transcriptformer.errors import DataError
from transcriptformer.generation.prompts import Prompt, longest_prompt

logger = logging.getLogger(__name__)

ALL = "all"
"""Name of the group of all cells, if no column is given."""

CELLS_PER_GROUP = 100
"""Default maximum number of cells per group."""


class CellGroup(NamedTuple):
    """Cells of one group, or a list of genes, as prompts.

    Attributes
    ----------
    name
        Value of the column that they share; of genes, these with their counts.
    prompts
        Tokens of each cell, in the order of inference; of genes, a single prompt.
    aux_tokens
        Auxiliary tokens (cells, columns), int64.
    is_genes
        Whether these are genes that a user lists, instead of cells, of which there may be one.
    """

    name: str
    prompts: list[Prompt]
    aux_tokens: np.ndarray
    is_genes: bool = False


def read_groups(
    source: str | Path | anndata.AnnData,
    checkpoint: Checkpoint,
    groupby: str | None = None,
    cells_per_group: int = CELLS_PER_GROUP,
    seed: int = 0,
    max_genes: int | None = None,
) -> list[CellGroup]:
    """Read a random sample of cells per group, without cells that have no gene of the vocabulary.

    Parameters
    ----------
    source
        File, store or AnnData with raw counts.
    groupby
        Column of `obs`; None: one group of all cells. Cells without a value are left out.
    cells_per_group
        Maximum number of cells per group.
    seed
        Seed of the sample.
    max_genes
        Maximum number of genes per cell; None: that of `longest_prompt`.

    Raises
    ------
    TranscriptFormerError
        If the source cannot be used, lacks the column, or no cell of it has a value.
    """
    config = checkpoint.config.model
    max_genes = longest_prompt(checkpoint) if max_genes is None else max_genes
    cells = open_source(source, config.data_config, checkpoint.gene_vocab, config.inference_config.oom_dataloader)
    try:
        codes, names = _groups(cells.obs.rows(0, len(cells), _columns(cells.obs.columns, groupby)), groupby, cells.name)
        reader = CellReader(cells, checkpoint.gene_vocab, checkpoint.aux_vocabs, config.data_config, max_genes)
        survey = survey_cells([reader], config.data_config)
        codes = np.where(survey.kept & (survey.lengths > 0), codes, -1)
        chosen = _sample(codes, len(names), cells_per_group, seed)
        if not len(chosen):
            raise DataError(f"{cells.name}: no cell has a gene of the vocabulary and a value of {groupby!r}")
        n_cut = int((survey.lengths[chosen] > max_genes).sum())
        logger.info("%s: %d cells in %d groups%s", cells.name, len(chosen), len(names), _cut(n_cut, max_genes))
        prompts, aux = _read(reader, chosen)
    finally:
        cells.close()
    members = [np.flatnonzero(codes[chosen] == code) for code in range(len(names))]
    return [
        CellGroup(name, [prompts[i] for i in rows], aux[rows])
        for name, rows in zip(names, members, strict=True)
        if len(rows)
    ]


def _columns(columns: list[str], groupby: str | None) -> list[str]:
    if groupby is not None and groupby not in columns:
        known = ", ".join(map(str, columns)) or "none"
        raise DataError(f"--groupby {groupby}: obs has no such column; its columns are: {known}")
    return [] if groupby is None else [groupby]


def _groups(obs: pd.DataFrame, groupby: str | None, name: str) -> tuple[np.ndarray, list[str]]:
    """Return the group of each cell (cells,), -1 without one, and the names of the groups, sorted."""
    if groupby is None:
        return np.zeros(len(obs), np.int64), [ALL]
    codes, values = pd.factorize(obs[groupby].astype(object).map(str, na_action="ignore"), sort=True)
    if (codes < 0).any():
        logger.warning("%s: %d cells without a value of %r are left out", name, int((codes < 0).sum()), groupby)
    return codes, list(values)


def _sample(codes: np.ndarray, n_groups: int, cells_per_group: int, seed: int) -> np.ndarray:
    """Choose up to `cells_per_group` cells of each group; return their indices, ascending."""
    rng = np.random.default_rng(seed)
    members = [rng.permutation(np.flatnonzero(codes == group))[:cells_per_group] for group in range(n_groups)]
    return np.sort(np.concatenate(members)) if members else np.zeros(0, np.int64)


def _cut(n_cut: int, max_genes: int) -> str:
    return f"; {n_cut} cut to their first {max_genes} genes" if n_cut else ""


def _read(reader: CellReader, chosen: np.ndarray) -> tuple[list[Prompt], np.ndarray]:
    """Tokenize cells, given by ascending indices (cells,)."""
    prompts, aux = list[Prompt](), list[np.ndarray]()
    size = reader.config.block_size
    for start in range(0, len(reader), size):
        cells = chosen[(chosen >= start) & (chosen < start + size)]
        if len(cells):
            block = reader.block(start, cells, cells)
            offsets = block.tokens.offsets[1:-1]
            genes, counts = (np.split(values, offsets) for values in block.tokens[:2])
            prompts += [Prompt(g.astype(np.int64), c) for g, c in zip(genes, counts, strict=True)]
            aux.append(block.aux_tokens)
    return prompts, np.concatenate(aux)
