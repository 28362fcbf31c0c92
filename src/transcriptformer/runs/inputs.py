"""The inputs of a run as one stream of cells, aligned with a checkpoint: batches, metadata, groups."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import anndata
import numpy as np
import pandas as pd

from transcriptformer.data.batches import BatchLimits, BatchLoader, CellDataset
from transcriptformer.data.joined import JoinedMetadata
from transcriptformer.data.metadata import BLOCK_SIZE, ColumnError
from transcriptformer.data.reader import CellReader
from transcriptformer.data.row_stream import check_writable_rows
from transcriptformer.data.source import CellSource, open_source
from transcriptformer.data.species import likely_species
from transcriptformer.data.store import Location
from transcriptformer.data.survey import Survey
from transcriptformer.errors import DataError
from transcriptformer.runs.cell_names import UniqueNames, stems_of, with_stem
from transcriptformer.runs.output import N_CELLS_COLUMN, select_columns
from transcriptformer.runs.pooling import NO_GROUP, pool_obs
from transcriptformer.runs.task import Task

logger = logging.getLogger(__name__)


class Inputs:
    """Open sources aligned with a checkpoint; counts are read lazily.

    Parameters
    ----------
    sources
        Files, stores, AnnData objects or open sources, in order.
    task
        What is computed from them, with the checkpoint's vocabularies and configuration.

    Raises
    ------
    TranscriptFormerError
        If a source cannot be used.
    """

    def __init__(self, sources: Sequence[Location | anndata.AnnData | CellSource], task: Task) -> None:
        self.task, self.checkpoint = task, task.checkpoint
        checkpoint = task.checkpoint
        model = checkpoint.config.model
        data, self.seq_len = model.data_config, model.model_config.seq_len
        self.readers = [
            CellReader(
                source
                if isinstance(source, CellSource)
                else open_source(source, data, checkpoint.gene_vocab, model.inference_config.oom_dataloader),
                checkpoint.gene_vocab,
                checkpoint.aux_vocabs,
                data,
                self.seq_len,
            )
            for source in sources
        ]
        self.stems = stems_of([source.name if isinstance(source, CellSource) else source for source in sources])
        self.metadata = [reader.source.obs for reader in self.readers]
        columns = dict.fromkeys(column for part in self.metadata for column in part.columns)
        self.columns = self._select_columns(list(columns))
        self.group_column = task.group_column
        self._groups: tuple[np.ndarray, pd.Index] | None = None
        self._unique_names: UniqueNames | None = None
        if self.group_column not in (None, *columns):
            raise DataError(
                f"{task.group_option} {self.group_column}: obs has no such column; its columns are: "
                f"{', '.join(map(str, columns)) or 'none'}"
            )
        if task.pool == N_CELLS_COLUMN:
            raise DataError(
                f"{task.group_option} {task.pool}: conflicts with the output column {task.pool!r}; rename the column "
                "of obs"
            )

    def _select_columns(self, columns: list[str]) -> list[str]:
        inference = self.checkpoint.config.model.inference_config
        chosen = select_columns(columns, inference.obs_keys)
        added = self.task.columns
        for column in added:
            if column in columns:
                logger.warning("obs already has a column %r; it is replaced by the results", column)
        return [column for column in chosen if column not in added]

    @cached_property
    def joined(self) -> JoinedMetadata:
        """Metadata to write to the output.

        Raises
        ------
        DataError
            If it cannot be read.
        """
        with self._suggest_dropping_column():
            return JoinedMetadata(self.metadata, self.columns)

    def check_obs(self, as_zarr: bool) -> None:
        """Check before computing that the output's `obs` can be read, joined and encoded.

        Parameters
        ----------
        as_zarr
            Whether the output is a zarr store rather than an h5ad file.

        Raises
        ------
        DataError
            If not; the message names the file, column and cell.
        """
        sources = [reader.source for reader in self.readers]
        if self.task.pool is None:
            with self._suggest_dropping_column():
                check_obs(sources, self.joined, as_zarr)
        elif self.group_column is not None:
            blocks = _all_blocks(sources, JoinedMetadata(self.metadata, [self.group_column]))
            groups = _factorize((block[self.group_column] for _, _, block in blocks), self.task.group_option)[1]
            table = pool_obs(np.array(["gene"]), np.arange(len(groups)), groups, self.group_column)
            check_writable_rows([(f"{self.task.group_option} {self.group_column}", 0, table)], len(table), as_zarr)

    @contextmanager
    def _suggest_dropping_column(self) -> Iterator[None]:
        """Extend errors about a column that the model does not need with the option that drops it."""
        try:
            yield
        except ColumnError as error:
            if error.column not in self.columns or error.column in self.checkpoint.aux_vocabs:
                raise
            others = ",".join(repr(str(column)) for column in self.columns if column != error.column)
            keys = f"[{others if len(others) < 300 else '...'}]"
            raise DataError(
                f'{error}; fix the column or drop it: --config-override "model.inference_config.obs_keys={keys}"'
            ) from error

    def close(self) -> None:
        """Close the files; they are reopened on the next read."""
        for reader in self.readers:
            reader.source.close()

    def loader(
        self, survey: Survey, limits: BatchLimits, process: int, n_processes: int, is_done: np.ndarray
    ) -> BatchLoader:
        """Batches for one of several processes, excluding the completed rows (kept cells,)."""
        data = self.checkpoint.config.model.data_config
        dataset = CellDataset(self.readers, survey.kept, survey.lengths, data.block_size)
        dataset.shard(process, n_processes, is_done)
        return BatchLoader(
            dataset,
            limits,
            self.checkpoint.gene_vocab.pad,
            self.seq_len,
            self.checkpoint.min_positions,
            data.n_data_workers,
            pin_memory=self.checkpoint.device.type == "cuda",
        )

    def obs_blocks(self, survey: Survey) -> Iterator[pd.DataFrame]:
        """Iterate over the metadata of the kept cells in blocks, in order.

        The survey must be the same in every call.
        """
        names = self._names(survey) if self.checkpoint.config.model.inference_config.make_names_unique else None
        start = 0
        for i, block in self._blocks(self.joined, survey):
            if names is not None:
                renamed = names.rename(with_stem(block.index, self.stems[i]), start)
                block = block.set_axis(pd.Index(renamed, name=block.index.name), axis="index")
            yield block
            start += len(block)

    def _names(self, survey: Survey) -> UniqueNames:
        if self._unique_names is None:
            blocks = self._blocks(JoinedMetadata(self.metadata, []), survey)
            self._unique_names = UniqueNames(with_stem(block.index, self.stems[i]) for i, block in blocks)
        return self._unique_names

    def obs(self, survey: Survey) -> pd.DataFrame:
        """Metadata of the kept cells."""
        with self._suggest_dropping_column():
            blocks = list(self.obs_blocks(survey))
        return blocks[0] if len(blocks) == 1 else pd.concat(blocks)

    def groups(self, survey: Survey) -> tuple[np.ndarray, pd.Index]:
        """Group of each kept cell (cells,), int32, and the group names.

        Cells without a value get `NO_GROUP`, and a warning is logged. The survey must be the same in every call.
        """
        if self._groups is None:
            self._groups = self._read_groups(survey)
        return self._groups

    def _read_groups(self, survey: Survey) -> tuple[np.ndarray, pd.Index]:
        if self.group_column is None:
            return np.zeros(survey.n_kept, np.int32), pd.Index(["all"])
        blocks = self._blocks(JoinedMetadata(self.metadata, [self.group_column]), survey)
        group_of_row, groups = _factorize((block[self.group_column] for _, block in blocks), self.task.group_option)
        n_without = int((group_of_row == NO_GROUP).sum())
        if n_without:
            logger.warning("%d cells without a value of %r are in no group", n_without, self.group_column)
        return group_of_row, groups

    def _blocks(self, metadata: JoinedMetadata, survey: Survey) -> Iterator[tuple[int, pd.DataFrame]]:
        """Iterate over the rows of the kept cells in blocks, each with the index of its source."""
        first = 0
        for i, part in enumerate(self.metadata):
            for start in range(0, len(part), BLOCK_SIZE):
                stop = min(start + BLOCK_SIZE, len(part))
                kept = survey.kept[first + start : first + stop]
                if kept.any():
                    block = metadata.rows(i, start, stop)
                    yield i, block if kept.all() else block.iloc[np.flatnonzero(kept)]
            first += len(part)

    def log_summary(self, survey: Survey) -> None:
        """Log the number of cells and genes, and what is dropped or unknown."""
        n_kept, seq_len = survey.n_kept, self.seq_len
        gene_ids = pd.unique(np.concatenate([reader.source.gene_ids for reader in self.readers]))
        n_known = int((self.checkpoint.gene_vocab.lookup(gene_ids) >= 0).sum())
        species = likely_species(gene_ids)
        genes = f"; {n_known} of {len(gene_ids)} genes are in the vocabulary{f' ({species})' if species else ''}"
        dropped = f" of {survey.n_read} (filters dropped the others)" if n_kept < survey.n_read else ""
        unknown = survey.unknown_aux[survey.kept].sum(axis=0).tolist()
        dropped_counts = f"{100 * survey.unseen_share:.1f} % of all counts dropped"
        notes = [
            (survey.n_empty, "without genes in the vocabulary"),
            (survey.n_too_long(seq_len), f"truncated to {seq_len} genes ({dropped_counts})"),
            *((n, f"with unknown {column}") for column, n in zip(self.checkpoint.aux_vocabs, unknown, strict=True)),
        ]
        details = "".join(f"; {n} {note}" for n, note in notes if n)
        logger.info("%d cells%s%s%s", n_kept, dropped, genes, details)
        for inferred, n_files in Counter("; ".join(found.values()) for found in self.describe()).items():
            logger.info("%s%s", inferred, f" ({n_files} inputs)" if len(self.readers) > 1 else "")
        if survey.n_repeated_names:
            self._log_repeated_names(survey.n_repeated_names)

    def describe(self) -> list[dict[str, str]]:
        """Describe what was inferred about each input, for the log."""
        return [reader.source.describe() for reader in self.readers]

    def inferred(self) -> list[dict[str, object]]:
        """Return what was inferred about each input, for the provenance."""
        return [{**reader.source.describe(), "metadata": reader.aux_names_taken()} for reader in self.readers]

    def _log_repeated_names(self, n: int) -> None:
        inference = self.checkpoint.config.model.inference_config
        if inference.make_names_unique:
            logger.info("%d cell names are not unique; names of inputs and running numbers are appended", n)
        elif self.task.pool is None:
            logger.warning(
                "%d cell names are not unique; add --make-names-unique to append the names of inputs, or match "
                "results to cells by row, in input order",
                n,
            )


def check_obs(sources: Sequence[CellSource], joined: JoinedMetadata, as_zarr: bool = False) -> None:
    """Check that the metadata of sources can be read and encoded.

    Raises
    ------
    ColumnError
        If a column cannot be read or written.
    """
    check_writable_rows(_all_blocks(sources, joined), len(joined), as_zarr)


def _all_blocks(sources: Sequence[CellSource], joined: JoinedMetadata) -> Iterator[tuple[str, int, pd.DataFrame]]:
    """Iterate over all rows in blocks, each with its source's name and its first row there."""
    for i, source in enumerate(sources):
        for start in range(0, len(source), BLOCK_SIZE):
            yield source.name, start, joined.rows(i, start, min(start + BLOCK_SIZE, len(source)))


def _factorize(blocks: Iterable[pd.Series], option: str) -> tuple[np.ndarray, pd.Index]:
    """Encode values as codes (rows,), int32, with `NO_GROUP` for missing ones, and return the distinct values.

    `option` names the option that chose the column, for messages.

    Raises
    ------
    DataError
        If values are not hashable, such as lists.
    """
    code_of: dict[object, int] = {}
    codes_of_blocks: list[np.ndarray] = []
    for block in blocks:
        try:
            codes, distinct = pd.factorize(block)
            global_codes = [code_of.setdefault(value, len(code_of)) for value in distinct]
        except TypeError as error:
            raise DataError(f"{option} {block.name}: values cannot be grouped ({error})") from error
        codes_of_blocks.append(np.array([*global_codes, NO_GROUP], np.int32)[codes])
    return np.concatenate(codes_of_blocks), pd.Index(list(code_of))
