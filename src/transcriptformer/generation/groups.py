"""Probabilities of the gene that follows the cells of a group, averaged over cells."""

from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.generation.cells import CELLS_PER_GROUP, CellGroup, read_groups
from transcriptformer.generation.means import log_mean
from transcriptformer.generation.next_genes import (
    PMI_KEY,
    Answers,
    all_log_probabilities,
    answer,
    make_answers,
)
from transcriptformer.generation.pmi import ERROR_KEY
from transcriptformer.runs.recording import OnProgress


def next_genes_of_cells(
    model: Checkpoint,
    data: str | Path | anndata.AnnData,
    groupby: str | None = None,
    *,
    cells_per_group: int = CELLS_PER_GROUP,
    candidates: Sequence[str] | None = None,
    seed: int = 0,
) -> anndata.AnnData:
    """Compute the probability of each gene to come next after the cells of a group, such as a cell type.

    Each cell is a prompt, with its genes as for `embed`, cut so that the model predicts one more.

    Parameters
    ----------
    model
        Checkpoint returned by `load`.
    data
        File, store or AnnData with raw counts.
    groupby
        Column of `obs`; None: one group of all cells.
    cells_per_group, seed
        Maximum number of cells per group, sampled with this seed.
    candidates
        Genes to choose among; None: all genes of the vocabulary.

    Returns
    -------
    An AnnData, groups × genes. `X` holds the log of the mean probability over cells, float32;
    `layers['standard_error']` its standard error; with several groups, `layers['pmi']` the difference to the log of the
    mean over groups. Otherwise as for `next_genes`.

    Raises
    ------
    TranscriptFormerError
        If the data cannot be used, or the checkpoint predicts no genes.
    """
    answers = make_answers(candidates, model)
    return ask_groups(model, read_groups(data, model, groupby, cells_per_group, seed), answers)


def ask_groups(
    checkpoint: Checkpoint, groups: Sequence[CellGroup], answers: Answers, on_progress: OnProgress | None = None
) -> anndata.AnnData:
    """Return what `next_genes_of_cells` does, for cells already read."""
    n_cells, n_done = [len(group.prompts) for group in groups], 0
    shape = len(groups), len(answers.tokens)
    means, errors = np.empty(shape), np.empty(shape, np.float32)
    for i, group in enumerate(groups):
        means[i], errors[i] = log_mean(all_log_probabilities(checkpoint, group.prompts, group.aux_tokens, answers))
        n_done += n_cells[i]
        if on_progress is not None:
            on_progress(n_done, sum(n_cells))
    layers = {ERROR_KEY: errors}
    if len(groups) > 1:
        layers[PMI_KEY] = (means - log_mean(means)[0]).astype(np.float32)
    obs = pd.DataFrame({"n_cells": n_cells}, index=[group.name for group in groups])
    return answer(checkpoint, means.astype(np.float32), obs, answers, layers)
