"""Survey of all cells before a run, which finds damaged data and collects statistics."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from transcriptformer.config import DataConfig
from transcriptformer.data.reader import CellReader
from transcriptformer.data.species import SpeciesCounts
from transcriptformer.data.tokenize import cells_to_keep, select_genes
from transcriptformer.errors import DataError
from transcriptformer.storage.sealed import read_sealed, write_sealed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """Statistics of the cells of all sources, concatenated.

    Attributes
    ----------
    kept
        Cells that passed the filters (cells,), bool.
    lengths
        Number of in-vocabulary genes that each cell expresses (cells,), int32.
    unknown_aux
        Whether values of auxiliary columns are outside their vocabularies (cells, columns), bool.
    totals
        Total count of the in-vocabulary genes (cells,), float64.
    unseen
        Total count of the genes beyond the model's sequence length (cells,), float32.
    n_fractional
        Number of sources with non-integer counts.
    n_repeated_names
        Number of kept cells that share the name of another cell, not counting the first of each name.
    """

    kept: np.ndarray
    lengths: np.ndarray
    unknown_aux: np.ndarray
    totals: np.ndarray
    unseen: np.ndarray
    n_fractional: int
    n_repeated_names: int

    @property
    def n_read(self) -> int:
        """Number of cells in the sources."""
        return len(self.kept)

    @property
    def n_kept(self) -> int:
        """Number of cells that passed the filters."""
        return int(self.kept.sum())

    @property
    def n_empty(self) -> int:
        """Number of kept cells without any in-vocabulary gene."""
        return int((self.lengths[self.kept] == 0).sum())

    def n_too_long(self, seq_len: int) -> int:
        """Return the number of kept cells with more than `seq_len` genes."""
        return int((self.lengths[self.kept] > seq_len).sum())

    @property
    def unseen_share(self) -> float:
        """Fraction of the kept cells' counts that is beyond the model's sequence length."""
        total = self.totals[self.kept].sum()
        return float(self.unseen[self.kept].sum() / total) if total > 0 else 0.0

    def save(self, path: Path) -> None:
        """Write to a sealed file."""
        values = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        write_sealed(path, values)

    @classmethod
    def load(cls, path: Path) -> "Survey":
        """Read a file written by `save`.

        Raises
        ------
        DamagedError
            If the file is missing, truncated or modified.
        """
        values: dict[str, Any] = {name: a if a.ndim else a.item() for name, a in read_sealed(path).items()}
        return cls(**values)


def survey_cells(
    readers: Sequence[CellReader], config: DataConfig, on_progress: Callable[[int, int], None] | None = None
) -> Survey:
    """Read every cell once; filters apply to each source separately.

    Raises
    ------
    DataError
        If counts are damaged, negative or not finite, or no cell passes the filters.
    """
    n_cells = sum(map(len, readers))
    lengths, totals, unseen = (np.zeros(n_cells, dtype) for dtype in (np.int32, np.float64, np.float32))
    unknown_aux = np.zeros((n_cells, len(readers[0].aux_vocabs)), bool)
    unknown = np.array([vocab.unknown for vocab in readers[0].aux_vocabs.values()])
    name_hashes = np.zeros(n_cells, np.uint64)
    kept, n_fractional, first = np.ones(n_cells, bool), 0, 0
    for reader in readers:
        is_integer, species = True, SpeciesCounts(reader.source.gene_ids)
        for start in range(0, len(reader), config.block_size):
            stop = min(start + config.block_size, len(reader))
            here = slice(first + start, first + stop)
            counts = reader.source.counts(start, stop)
            species.add(counts)
            genes = select_genes(counts, reader.column_tokens)
            lengths[here], totals[here] = genes.lengths, genes.totals()
            if genes.lengths.max(initial=0) > reader.seq_len:
                unseen[here] = totals[here] - reader.counts_seen(genes, start)
            is_integer = is_integer and bool((genes.counts == np.rint(genes.counts)).all())
            unknown_aux[here] = reader.aux_tokens(start, stop) == unknown
            name_hashes[here] = pd.util.hash_array(reader.source.obs.rows(start, stop, []).index.to_numpy())
            if on_progress is not None:
                on_progress(first + stop, n_cells)
        own = slice(first, first + len(reader))
        kept[own] = cells_to_keep(lengths[own], totals[own], config.filter_outliers, config.min_expressed_genes)
        first += len(reader)
        if not is_integer:
            n_fractional += 1
            logger.warning(
                "%s: counts are not integers; the model expects raw counts, not normalized ones",
                reader.source.name,
            )
        if species.is_mixed:
            logger.warning(
                "%s: genes of several species: %s; embed the cells of each species by themselves",
                reader.source.name,
                species.describe(),
            )
        reader.log_aux_values()
    if not kept.any():
        raise DataError(
            f"the filters removed all {n_cells} cells; relax model.data_config."
            f"filter_outliers={config.filter_outliers:g}, "
            f"min_expressed_genes={config.min_expressed_genes}"
        )
    n_repeated = int(kept.sum()) - len(np.unique(name_hashes[kept]))
    return Survey(kept, lengths, unknown_aux, totals, unseen, n_fractional, n_repeated)
