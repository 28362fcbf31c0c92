"""Genes that groups of cells express like given ones."""

import logging
from collections.abc import Iterable

import numpy as np

from transcriptformer.data.reader import CellBlock
from transcriptformer.generation.effects import ALL, Groups
from transcriptformer.generation.null import MIN_NULL, draw_alike

logger = logging.getLogger(__name__)


def expression_in_groups(blocks: Iterable[CellBlock], groups: Groups, n_tokens: int) -> np.ndarray:
    """Return log(1 + mean count) of each token, as the model sees it, in all cells and each group (1 + groups, tokens).

    Parameters
    ----------
    blocks
        All cells of the groups.
    n_tokens
        Size of the gene vocabulary.
    """
    n_groups, of_row = 1 + len(groups.names), 1 + groups.of_row  # 0: in none
    totals = np.zeros((n_groups, n_tokens))
    for block in blocks:
        keys = of_row[block.rows][block.tokens.rows] * n_tokens + block.tokens.genes
        totals += np.bincount(keys, block.tokens.counts, totals.size).reshape(totals.shape)
    n_cells = np.bincount(of_row, minlength=n_groups)
    totals[0], n_cells[0] = totals.sum(0), len(of_row)
    return np.log1p(totals / np.maximum(n_cells, 1)[:, None])


def draw_matched(expression: np.ndarray, tokens: np.ndarray, n: int, groups: Groups, seed: int) -> np.ndarray:
    """Draw `n` genes for each group and gene from those of like expression that are no genes of the list.

    Parameters
    ----------
    expression
        Expression of each token in each group (1 + groups, vocabulary).
    tokens
        The genes (genes,).

    Returns
    -------
    Tokens (1 + groups, genes, n); -1 where a group expresses too few other genes.
    """
    drawn = np.full((len(expression), len(tokens), n), -1)
    for g, (group, of_group) in enumerate(zip((ALL, *groups.names), expression, strict=True)):
        free = np.setdiff1d(np.flatnonzero(of_group), tokens)
        n_drawn = min(n, len(free))
        if n_drawn < MIN_NULL:
            logger.warning("%s: only %d other genes are expressed, too few for a null", group, n_drawn)
            continue
        for i, token in enumerate(tokens):
            rng = np.random.default_rng([seed, g, i])
            drawn[g, i, :n_drawn] = free[draw_alike(of_group[free], of_group[token], n_drawn, rng)]
    return drawn
