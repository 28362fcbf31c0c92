"""The cells of a training run, their labels, and the split into training and validation."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from transcriptformer.config import DataConfig
from transcriptformer.data.batches import CellDataset
from transcriptformer.data.metadata import factorize
from transcriptformer.data.reader import CellReader
from transcriptformer.data.source import CellSource, open_source
from transcriptformer.data.store import find_files, is_url
from transcriptformer.data.survey import Survey
from transcriptformer.errors import DataError, UsageError
from transcriptformer.model.label_head import NO_LABEL
from transcriptformer.training.config import TrainingConfig
from transcriptformer.training.order import Blocks, Epochs
from transcriptformer.vocab import AuxVocab, GeneVocab

logger = logging.getLogger(__name__)

_VALIDATION = 100
"""Key of a random generator; see `transcriptformer.training.order`."""

MAX_LABELS = 10_000
"""A column with more distinct values does not hold labels."""

MIN_RUNS = 64
"""Validation cells are chosen in runs of consecutive cells, which are read together; minimum number of runs."""


class Corpus:
    """The open files of a training run; counts are not read yet.

    Parameters
    ----------
    training
        Names of the files.
    data
        Where the files hold genes and counts.
    gene_vocab
        Genes to look for.

    Raises
    ------
    TranscriptFormerError
        If a file cannot be used.
    """

    def __init__(self, training: TrainingConfig, data: DataConfig, gene_vocab: GeneVocab) -> None:
        self.training, self.data = training, data
        self.files = [find_files(name) for name in training.data_files]
        self.validation_files = [file for name in training.validation_files for file in find_files(name)]
        training_files = [file for files in self.files for file in files]
        _refuse_repeated(training_files, self.validation_files)
        self.sources = [open_source(file, data, gene_vocab) for file in (*training_files, *self.validation_files)]
        self.n_training_files = len(training_files)

    @property
    def weights(self) -> list[float]:
        """Passes over each source per epoch; 0 for validation files."""
        weights = self.training.data_weights or [1.0] * len(self.files)
        of_sources = [weight for weight, files in zip(weights, self.files, strict=True) for _ in files]
        return of_sources + [0.0] * len(self.validation_files)

    def values(self, column: str) -> list[str]:
        """Return the distinct values of a metadata column in the training files."""
        return factorize([source.obs for source in self.sources[: self.n_training_files]], column)[1]

    def labels(self, column: str, known: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
        """Return the label index of every cell (cells,), int64, and the label names: `known`, or those in the column.

        Raises
        ------
        DataError
            If a file lacks the column, or its values are not usable as labels.
        """
        for source in self.sources:
            if column not in source.obs.columns:
                columns = ", ".join(map(str, source.obs.columns)) or "none"
                raise DataError(f"--label-column {column}: {source.name} has no such obs column; it has: {columns}")
        codes, values = factorize([source.obs for source in self.sources], column)
        n_training_cells = sum(len(source) for source in self.sources[: self.n_training_files])
        found = [values[code] for code in np.unique(codes[:n_training_cells]) if code >= 0]
        labels = found if known is None else list(known)
        if not 2 <= len(labels) <= MAX_LABELS:
            raise DataError(
                f"--label-column {column}: {len(labels)} distinct values; choose a column with 2 to {MAX_LABELS}"
            )
        index = {label: i for i, label in enumerate(labels)}
        if not any(value in index for value in found):
            raise DataError(
                f"--label-column {column}: none of the values {', '.join(found[:3])}, … is a label of the checkpoint's "
                f"head ({', '.join(labels[:3])}, …); rename the column to train a new head"
            )
        unknown = [value for value in values if value not in index]
        if unknown:
            logger.warning("--label-column %s: cells with %s are unlabeled", column, ", ".join(unknown[:5]))
        return np.array([*(index.get(value, NO_LABEL) for value in values), NO_LABEL])[codes], labels

    def readers(self, gene_vocab: GeneVocab, aux_vocabs: Mapping[str, AuxVocab], seq_len: int) -> list[CellReader]:
        """Return readers of the sources, aligned with the vocabularies."""
        return [CellReader(source, gene_vocab, aux_vocabs, self.data, seq_len) for source in self.sources]

    def close(self) -> None:
        """Close the files."""
        for source in self.sources:
            source.close()


def _refuse_repeated(training_files: Sequence[str], validation_files: Sequence[str]) -> None:
    """Raise UsageError if a file is named twice, by whatever path: cells held out would also be learned."""
    seen: dict[str, str] = {}
    for option, files in (("--data-file", training_files), ("--validation-file", validation_files)):
        for file in files:
            place = file if is_url(file) else str(Path(file).resolve())
            if place in seen:
                raise UsageError(f"{option} {file}: the same file as {seen[place]}; name it once")
            seen[place] = f"{option} {file}"


class Split:
    """The split into training and validation cells.

    Parameters
    ----------
    corpus
        The cells.
    survey
        Number of known genes of each cell, and whether it passes the filters.
    """

    def __init__(self, corpus: Corpus, survey: Survey) -> None:
        self.corpus, self.survey = corpus, survey
        self.n_cells = [len(source) for source in corpus.sources]
        n_training_cells = sum(self.n_cells[: corpus.n_training_files])
        usable = survey.kept & (survey.lengths > 0)
        self.is_validation = usable & (np.arange(len(usable)) >= n_training_cells)
        if not corpus.validation_files and corpus.training.validation_fraction > 0:
            self.is_validation = usable & self._choose(np.flatnonzero(usable))
        self.is_training = usable & ~self.is_validation
        for name, chosen in (("training", self.is_training), ("validation", self.is_validation)):
            is_needed = name == "training" or corpus.training.has_validation
            if is_needed and not chosen.any():
                raise DataError(
                    f"no {name} cells: {usable.sum()} of {len(usable)} cells pass the filters and express a known "
                    "gene; check model.data_config, such as gene_col_name"
                )

    def _choose(self, usable: np.ndarray) -> np.ndarray:
        """Choose validation cells from the usable ones in short runs; return a mask (cells,)."""
        training = self.corpus.training
        n_validation_cells = max(1, round(training.validation_fraction * len(usable)))
        run = max(1, min(training.block_size, n_validation_cells // MIN_RUNS))
        runs = np.random.default_rng([training.seed, _VALIDATION]).permutation(-(-len(usable) // run))
        order = (runs[:, None] * run + np.arange(run)).ravel()
        chosen = np.zeros(len(self.survey.kept), bool)
        chosen[usable[order[order < len(usable)][:n_validation_cells]]] = True
        return chosen

    def epochs(self, n_streams: int) -> Epochs:
        """Return the order of the training cells."""
        training = self.corpus.training
        blocks = Blocks(self.n_cells, self.is_training, training.block_size)
        window = training.block_size * training.blocks_to_mix
        return Epochs(blocks, self.corpus.weights, n_streams, window, training.batch_size, training.seed)

    def validation_cells(self, readers: Sequence[CellReader], process: int, n_processes: int) -> CellDataset:
        """Return the validation cells of one process, in file order."""
        dataset = CellDataset(readers, self.is_validation, self.survey.lengths, self.corpus.training.block_size)
        dataset.shard(process, n_processes, np.zeros(dataset.n_kept, bool))
        return dataset

    def describe(self, rows: np.ndarray) -> str:
        """Format rows of the corpus for error messages: the first three, with their files."""
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
