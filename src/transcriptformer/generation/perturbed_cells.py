"""Which cells a perturbation changes, and the tokens of the changed cells."""

from typing import NamedTuple

import numpy as np

from transcriptformer.data.batches import positions
from transcriptformer.generation.perturbations import REMOVED

_KNOCK_OUT, _SET, _ADD = -1, 0, 1


class Cells(NamedTuple):
    """Genes of a batch of B cells, of at most `seq_len` positions, of which the last is no input of the model.

    Attributes
    ----------
    genes, counts
        Padded with `pad`, and with count 0 (B, L).
    pad
        Token for padding.
    seq_len
        Number of positions of the model.
    """

    genes: np.ndarray
    counts: np.ndarray
    pad: int
    seq_len: int

    @property
    def n_genes(self) -> np.ndarray:
        """Number of genes of each cell (B,)."""
        return (self.genes != self.pad).sum(1)

    def find(self, tokens: np.ndarray) -> np.ndarray:
        """Return the position of genes (B, E) in each cell, -1 where absent; negative tokens are."""
        n_tokens = 1 + max(self.genes.max(), tokens.max())
        first = n_tokens * np.arange(len(self.genes))[:, None]  # makes the genes of each cell distinct
        keys, sought = (first + self.genes).ravel(), first + tokens.clip(min=0)
        order = np.argsort(keys, kind="stable")
        found = order[np.searchsorted(keys, sought, sorter=order).clip(max=len(order) - 1)]
        return np.where((keys[found] == sought) & (tokens >= 0), found % self.genes.shape[1], -1)


class Changes(NamedTuple):
    """Changes of one gene of a cell each (K,).

    Attributes
    ----------
    cells
        Index in the batch of the cell.
    places
        Position of the gene that is removed, set or added.
    tokens, counts
        The gene and its new count.
    steps
        Number of genes that are added: -1, 0 or 1.
    """

    cells: np.ndarray
    places: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    steps: np.ndarray

    def take(self, indices: np.ndarray) -> "Changes":
        """Return the changes with the given indices."""
        return Changes(*(values[indices] for values in self))


class Plan(NamedTuple):
    """What must be computed for E perturbations of each cell of a batch.

    Attributes
    ----------
    known
        Shifts that need no run (B, E), float32: 0 where the input of the model stays as it is, else NaN.
    changes
        Distinct changes that the model must run on (K,).
    change_of
        Index of the change of each cell and perturbation (B, E); -1: none.
    """

    known: np.ndarray
    changes: Changes
    change_of: np.ndarray


def plan(cells: Cells, tokens: np.ndarray, counts: np.ndarray, at: str) -> Plan:
    """Plan perturbations; knock-outs of absent genes, and of the only gene of a cell, have no result.

    Parameters
    ----------
    tokens
        Gene of each perturbation (B, E); -1: none, which has no result.
    counts
        Its new count (E,), or `REMOVED`.
    at
        Where absent genes are added: end (the last position that is input) or start.
    """
    counts, rows = np.broadcast_to(counts, tokens.shape), np.arange(len(tokens))[:, None]
    places, is_removed, n_genes = cells.find(tokens), counts == REMOVED, cells.n_genes[:, None]
    is_present = places >= 0
    has_result = (tokens >= 0) & (~is_removed | is_present & (n_genes > 1))
    is_same = is_present & ((places == cells.seq_len - 1) | (cells.counts[rows, places] == counts))
    added = np.minimum(n_genes, cells.seq_len - 2) if at == "end" else np.zeros_like(n_genes)
    steps = np.where(is_removed, _KNOCK_OUT, np.where(is_present, _SET, _ADD))
    is_run = has_result & ~is_same
    cell_of = np.broadcast_to(rows, tokens.shape)
    every = Changes(*(v[is_run] for v in (cell_of, np.where(is_present, places, added), tokens, counts, steps)))
    keys = np.stack([every.cells, every.tokens, every.counts])
    _, distinct, change_of_run = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    change_of = np.full(tokens.shape, -1)
    change_of[is_run] = change_of_run.ravel()
    return Plan(np.where(has_result & is_same, 0, np.nan).astype(np.float32), every.take(distinct), change_of)


def changed(cells: Cells, changes: Changes, min_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the genes and counts of changed cells, padded (K, positions); what does not fit is dropped.

    Parameters
    ----------
    min_positions
        Minimum number of positions.
    """
    n_genes = cells.n_genes[changes.cells] + changes.steps
    width = positions(int(n_genes.max()), cells.seq_len, min_positions)
    index, places, steps = np.arange(width), changes.places[:, None], changes.steps[:, None]
    missing = (0, 0), (0, max(0, width + 1 - cells.genes.shape[1]))
    sources = (index - steps * (index >= places)).clip(min=0)
    is_new = (index == places) & (steps != _KNOCK_OUT)
    arrays = (cells.genes, cells.pad, changes.tokens), (cells.counts, 0, changes.counts.astype(np.float32))
    genes, counts = (
        np.where(
            is_new,
            new[:, None],
            np.take_along_axis(np.pad(values, missing, constant_values=pad)[changes.cells], sources, axis=1),
        )
        for values, pad, new in arrays
    )
    return genes, counts
