"""The cells of a training run: which are learned from, which are validated on, and their labels."""

import glob
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from transcriptformer.config import DataConfig
from transcriptformer.data.batches import CellDataset
from transcriptformer.data.metadata import encode
from transcriptformer.data.reader import CellReader
from transcriptformer.data.source import CellSource, open_source
from transcriptformer.data.store import is_url
from transcriptformer.data.survey import Survey
from transcriptformer.errors import DataError, UsageError
from transcriptformer.model.label_head import NO_LABEL
from transcriptformer.training.config import TrainingConfig
from transcriptformer.training.order import Blocks, Epochs
from transcriptformer.vocab import AuxVocab, GeneVocab

logger = logging.getLogger(__name__)

_VALIDATION = 100
"""What a random generator is for; see `transcriptformer.training.order`."""

MOST_LABELS = 10_000
"""A column with more distinct values holds something else than labels."""

LEAST_RUNS = 64
"""Validation cells are chosen in runs of consecutive ones, which are read at once, but in no fewer runs than this."""


class Corpus:
    """Files of cells, opened; no count is read yet.

    Parameters
    ----------
    training
        Names the files.
    data
        How their counts are found.

    Raises
    ------
    TranscriptFormerError
        If one of them cannot be used.
    """

    def __init__(self, training: TrainingConfig, data: DataConfig) -> None:
        self.training, self.data = training, data
        self.files = [find_files(name) for name in training.data_files]
        self.validation_files = [file for name in training.validation_files for file in find_files(name)]
        learned = [file for files in self.files for file in files]
        both = set(learned) & set(self.validation_files)
        if both:
            raise UsageError(f"training.validation_files: {sorted(both)[0]} is also learned from")
        self.sources = [
            open_source(
                file,
                data.gene_col_name,
                data.use_raw,
                data.remove_duplicate_genes,
                layer=data.layer,
                allow_external_links=data.allow_external_links,
            )
            for file in (*learned, *self.validation_files)
        ]
        self.n_learned = len(learned)

    @property
    def weights(self) -> list[float]:
        """Passes over each source in an epoch; those that are validated on have none."""
        weights = self.training.data_weights or [1.0] * len(self.files)
        of_sources = [weight for weight, files in zip(weights, self.files, strict=True) for _ in files]
        return of_sources + [0.0] * len(self.validation_files)

    def values(self, column: str) -> list[str]:
        """Distinct values that a column of metadata has in the files that are learned from."""
        return encode([source.obs for source in self.sources[: self.n_learned]], column)[1]

    def labels(self, column: str, known: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
        """Label of every cell (cells,), int64, and what they stand for: `known`, or what the column holds.

        Raises
        ------
        DataError
            If a file does not have the column, or there are fewer than two labels.
        """
        for source in self.sources:
            if column not in source.obs.columns:
                columns = ", ".join(map(str, source.obs.columns)) or "none"
                raise DataError(f"--label-column {column}: {source.name} has no such column of obs; it has: {columns}")
        codes, values = encode([source.obs for source in self.sources], column)
        n_learned = sum(len(source) for source in self.sources[: self.n_learned])
        found = [values[code] for code in np.unique(codes[:n_learned]) if code >= 0]
        labels = found if known is None else list(known)
        if not 2 <= len(labels) <= MOST_LABELS:
            raise DataError(
                f"--label-column {column}: holds {len(labels)} distinct values; from 2 to {MOST_LABELS} can be learned"
            )
        number = {label: i for i, label in enumerate(labels)}
        if not any(value in number for value in found):
            raise DataError(
                f"--label-column {column}: holds {', '.join(found[:3])}, …, but the checkpoint's head tells "
                f"{', '.join(labels[:3])}, …; a column of another name gets a head of its own"
            )
        others = [value for value in values if value not in number]
        if others:
            logger.warning("--label-column %s: cells of %s are taken as without a label", column, ", ".join(others[:5]))
        return np.array([*(number.get(value, NO_LABEL) for value in values), NO_LABEL])[codes], labels

    def readers(self, gene_vocab: GeneVocab, aux_vocabs: Mapping[str, AuxVocab], seq_len: int) -> list[CellReader]:
        """The sources aligned with vocabularies."""
        return [CellReader(source, gene_vocab, aux_vocabs, self.data, seq_len) for source in self.sources]

    def close(self) -> None:
        """Let go of the files."""
        for source in self.sources:
            source.close()


def find_files(name: str) -> list[str]:
    """The files that a name with wildcards stands for, in the order of their names.

    Raises
    ------
    UsageError
        If there is none.
    """
    if is_url(name) or not glob.has_magic(name) or Path(name).exists():
        return [name]
    found = sorted(glob.glob(name, recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
    if not found:
        raise UsageError(f"--data-file {name}: no file bears such a name")
    return found


class Split:
    """Which cells are learned from, and which are validated on.

    Parameters
    ----------
    corpus
        The cells.
    survey
        What was found in them.
    """

    def __init__(self, corpus: Corpus, survey: Survey) -> None:
        self.corpus, self.survey = corpus, survey
        self.n_cells = [len(source) for source in corpus.sources]
        n_learned = sum(self.n_cells[: corpus.n_learned])
        usable = survey.kept & (survey.lengths > 0)
        self.is_validated = usable & (np.arange(len(usable)) >= n_learned)
        if not corpus.validation_files and corpus.training.validation_fraction > 0:
            self.is_validated = usable & self._choose(np.flatnonzero(usable))
        self.is_learned = usable & ~self.is_validated
        for name, chosen in (("learn from", self.is_learned), ("validate on", self.is_validated)):
            wanted = name == "learn from" or corpus.training.has_validation
            if wanted and not chosen.any():
                raise DataError(
                    f"there is no cell to {name}: {len(usable)} were read, {usable.sum()} have a known gene"
                )

    def _choose(self, usable: np.ndarray) -> np.ndarray:
        """Mask of cells (cells,) that are validated on, chosen from the usable ones in short runs."""
        training = self.corpus.training
        n_wanted = max(1, round(training.validation_fraction * len(usable)))
        run = max(1, min(training.block_size, n_wanted // LEAST_RUNS))
        runs = np.random.default_rng([training.seed, _VALIDATION]).permutation(-(-len(usable) // run))
        order = (runs[:, None] * run + np.arange(run)).ravel()
        chosen = np.zeros(len(self.survey.kept), bool)
        chosen[usable[order[order < len(usable)][:n_wanted]]] = True
        return chosen

    def epochs(self, n_streams: int) -> Epochs:
        """The order in which cells are learned from."""
        training = self.corpus.training
        blocks = Blocks(self.n_cells, self.is_learned, training.block_size)
        window = training.block_size * training.blocks_to_mix
        return Epochs(blocks, self.corpus.weights, n_streams, window, training.batch_size, training.seed)

    def validation_cells(self, readers: Sequence[CellReader], process: int, n_processes: int) -> CellDataset:
        """The cells that are validated on, in the order of the files, for one of several processes."""
        dataset = CellDataset(readers, self.is_validated, self.survey.lengths, self.corpus.training.block_size)
        dataset.deal_out(process, n_processes, np.zeros(dataset.n_kept, bool))
        return dataset

    def describe(self, rows: np.ndarray) -> str:
        """Rows among all cells, in words: the first three, with the files they are in."""
        starts = np.concatenate([[0], np.cumsum(self.n_cells)])
        named = []
        for row in rows[:3].tolist():
            number = int(np.searchsorted(starts, row, side="right")) - 1
            source, cell = self.corpus.sources[number], row - int(starts[number])
            named.append(f"{_cell_name(source, cell)!r} ({source.name}, row {cell})")
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        return f"{len(rows)} cells: {', '.join(named)}{more}"


def _cell_name(source: CellSource, cell: int) -> str:
    return str(source.obs.rows(cell, cell + 1, []).index[0])
