"""One pass over all cells before anything is computed: damage is found now, and what a run will meet is known."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from transcriptformer.config import DataConfig
from transcriptformer.data.reader import CellReader
from transcriptformer.data.tokenize import cells_to_keep
from transcriptformer.errors import DataError
from transcriptformer.storage.sealed import read_sealed, write_sealed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """What is known of every cell that was read; arrays follow the sources, one after the other.

    Attributes
    ----------
    kept
        Cells that passed the filters (cells,), bool.
    lengths
        Genes of the vocabulary that each cell expresses (cells,), int32.
    unknown_aux
        Values of auxiliary columns that are not in their vocabularies (cells, columns), bool.
    totals
        Sum of the counts of those genes (cells,), float64.
    unseen
        Sum of the counts beyond the positions of the model (cells,), float32.
    n_fractional
        Sources whose counts are not whole numbers.
    n_repeated_names
        Cells whose name an earlier cell has.
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
        """Cells in the sources."""
        return len(self.kept)

    @property
    def n_kept(self) -> int:
        """Cells that passed the filters."""
        return int(self.kept.sum())

    @property
    def n_empty(self) -> int:
        """Kept cells without any gene of the vocabulary."""
        return int((self.lengths[self.kept] == 0).sum())

    def n_too_long(self, seq_len: int) -> int:
        """Kept cells with more genes than the model has positions."""
        return int((self.lengths[self.kept] > seq_len).sum())

    @property
    def unseen_share(self) -> float:
        """Share of the kept cells' counts that lies beyond the positions of the model."""
        total = self.totals[self.kept].sum()
        return float(self.unseen[self.kept].sum() / total) if total > 0 else 0.0

    def save(self, path: Path) -> None:
        """Write to a sealed file."""
        values = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        write_sealed(path, values)

    @classmethod
    def load(cls, path: Path) -> "Survey":
        """Read what `save` wrote.

        Raises
        ------
        DamagedError
            If the file is missing, truncated or altered.
        """
        values: dict[str, Any] = {name: a if a.ndim else a.item() for name, a in read_sealed(path).items()}
        return cls(**values)


def survey_cells(
    readers: Sequence[CellReader], config: DataConfig, on_progress: Callable[[int, int], None] | None = None
) -> Survey:
    """Read every cell once; the filters look at each source by itself.

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
        is_whole = True
        for start in range(0, len(reader), config.block_size):
            stop = min(start + config.block_size, len(reader))
            here = slice(first + start, first + stop)
            genes = reader.selected_genes(start, stop)
            lengths[here], totals[here] = genes.lengths, genes.totals()
            if genes.lengths.max(initial=0) > reader.seq_len:
                unseen[here] = totals[here] - reader.counts_seen(genes, start)
            is_whole = is_whole and bool((genes.counts == np.rint(genes.counts)).all())
            unknown_aux[here] = reader.aux_tokens(start, stop) == unknown
            name_hashes[here] = pd.util.hash_array(reader.source.obs.rows(start, stop, []).index.to_numpy())
            if on_progress is not None:
                on_progress(first + stop, n_cells)
        whole = slice(first, first + len(reader))
        kept[whole] = cells_to_keep(lengths[whole], totals[whole], config.filter_outliers, config.min_expressed_genes)
        first += len(reader)
        if not is_whole:
            n_fractional += 1
            logger.warning(
                "%s: counts are not whole numbers; the model expects raw counts, not normalized ones",
                reader.source.name,
            )
        reader.tell_of_missing_columns()
    if not kept.any():
        raise DataError(
            f"no cell is left by the filters: {n_cells} were read; see "
            f"model.data_config.filter_outliers={config.filter_outliers:g}, "
            f"min_expressed_genes={config.min_expressed_genes}"
        )
    n_repeated = int(kept.sum()) - len(np.unique(name_hashes[kept]))
    if n_repeated:
        logger.warning("%d cells bear a name that another one has; rows are in the order of the input", n_repeated)
    return Survey(kept, lengths, unknown_aux, totals, unseen, n_fractional, n_repeated)
