"""The inputs of a run as one stream of cells, seen through a checkpoint: batches, metadata, groups."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from transcriptformer.checkpoint import Checkpoint
from transcriptformer.data.dataset import BatchLimits, BatchLoader, CellDataset
from transcriptformer.data.metadata import BLOCK_SIZE, JoinedMetadata
from transcriptformer.data.reader import CellReader
from transcriptformer.data.source import open_source
from transcriptformer.data.species import likely_species
from transcriptformer.data.survey import Survey
from transcriptformer.errors import DataError
from transcriptformer.output import select_columns
from transcriptformer.pooling import NO_GROUP

logger = logging.getLogger(__name__)

ALL_CELLS = "gene"
"""Value of `cge_pool` that stands for one group of all cells."""


class Inputs:
    """Sources opened and aligned with a checkpoint; no count is read yet.

    Parameters
    ----------
    sources
        Files, stores or AnnData objects, in order.
    checkpoint
        Whose vocabularies and configuration apply.

    Raises
    ------
    TranscriptFormerError
        If one of them cannot be used.
    """

    def __init__(self, sources: Sequence[str | Path | anndata.AnnData], checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        model = checkpoint.config.model
        data, self.seq_len = model.data_config, model.model_config.seq_len
        self.readers = [
            CellReader(
                open_source(
                    source,
                    data.gene_col_name,
                    data.use_raw,
                    data.remove_duplicate_genes,
                    model.inference_config.oom_dataloader,
                    data.layer,
                ),
                checkpoint.gene_vocab,
                checkpoint.aux_vocabs,
                data,
                self.seq_len,
            )
            for source in sources
        ]
        self.metadata = [reader.source.obs for reader in self.readers]
        columns = dict.fromkeys(column for part in self.metadata for column in part.columns)
        self.columns = select_columns(list(columns), model.inference_config.obs_keys)
        self.joined = JoinedMetadata(self.metadata, self.columns)
        pool = model.inference_config.cge_pool
        self.group_column = None if pool == ALL_CELLS else pool
        if self.group_column not in (None, *columns):
            raise DataError(
                f"--cge-pool {pool}: obs has no such column; its columns are: {', '.join(columns) or 'none'}"
            )

    def close(self) -> None:
        """Let go of the files; they are opened again where something is read."""
        for reader in self.readers:
            reader.source.close()

    def loader(
        self, survey: Survey, limits: BatchLimits, process: int, n_processes: int, is_done: np.ndarray
    ) -> BatchLoader:
        """Batches for one of several processes, without the rows that are done (kept cells,)."""
        data = self.checkpoint.config.model.data_config
        dataset = CellDataset(self.readers, survey.kept, survey.lengths, data.block_size)
        dataset.deal_out(process, n_processes, is_done)
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
        """Metadata of the kept cells, in order, in blocks."""
        yield from self._blocks(self.joined, survey)

    def obs(self, survey: Survey) -> pd.DataFrame:
        """Metadata of the kept cells."""
        blocks = list(self.obs_blocks(survey))
        return blocks[0] if len(blocks) == 1 else pd.concat(blocks)

    def groups(self, survey: Survey) -> tuple[np.ndarray, pd.Index]:
        """Group of each kept cell (cells,), int32, for pooling, and the names of the groups.

        Cells without a value have no group, which is told.
        """
        if self.group_column is None:
            return np.zeros(survey.n_kept, np.int32), pd.Index(["all"])
        numbers: dict[object, int] = {}
        groups: list[np.ndarray] = []
        for block in self._blocks(JoinedMetadata(self.metadata, [self.group_column]), survey):
            codes, distinct = pd.factorize(block[self.group_column])
            number = [numbers.setdefault(value, len(numbers)) for value in distinct]
            groups.append(np.array([*number, NO_GROUP], np.int32)[codes])
        group_of_row = np.concatenate(groups)
        n_without = int((group_of_row == NO_GROUP).sum())
        if n_without:
            logger.warning("%d cells without a value of %r are left out of the pool", n_without, self.group_column)
        return group_of_row, pd.Index(list(numbers))

    def _blocks(self, metadata: JoinedMetadata, survey: Survey) -> Iterator[pd.DataFrame]:
        first = 0
        for i, part in enumerate(self.metadata):
            for start in range(0, len(part), BLOCK_SIZE):
                stop = min(start + BLOCK_SIZE, len(part))
                kept = survey.kept[first + start : first + stop]
                if kept.any():
                    block = metadata.rows(i, start, stop)
                    yield block if kept.all() else block.iloc[np.flatnonzero(kept)]
            first += len(part)

    def tell(self, survey: Survey) -> None:
        """Log what is worth knowing about the cells."""
        n_kept, seq_len = survey.n_kept, self.seq_len
        gene_ids = np.concatenate([reader.source.gene_ids for reader in self.readers])
        n_known = int((self.checkpoint.gene_vocab.lookup(gene_ids) >= 0).sum())
        species = likely_species(gene_ids)
        genes = f"; {n_known} of {len(gene_ids)} genes are in the vocabulary{f' ({species})' if species else ''}"
        dropped = f" of {survey.n_read} (the filters dropped the others)" if n_kept < survey.n_read else ""
        unknown = survey.unknown_aux[survey.kept].sum(axis=0).tolist()
        unseen = f"with more than {seq_len} genes, of which the model sees {seq_len}"
        notes = [
            (survey.n_empty, "without any gene of the vocabulary"),
            (survey.n_too_long(seq_len), f"{unseen} ({100 * survey.unseen_share:.1f} % of all counts are not seen)"),
            *(
                (n, f"of an {c} unknown to the checkpoint")
                for c, n in zip(self.checkpoint.aux_vocabs, unknown, strict=True)
            ),
        ]
        told = "".join(f"; {n} {what}" for n, what in notes if n)
        logger.info("%d cells%s%s%s", n_kept, dropped, genes, told)
