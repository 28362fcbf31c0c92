"""In-silico perturbation of real cells: how far a gene moves their embeddings."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.config import MAX_INT, Config, require_ranges
from transcriptformer.data.batches import BatchLimits, CellDataset
from transcriptformer.data.row_stream import RowStream
from transcriptformer.data.store import Location
from transcriptformer.data.survey import Survey
from transcriptformer.errors import UsageError
from transcriptformer.generation.dot_plot import draw
from transcriptformer.generation.effects import (
    ALL,
    LABEL_CHANGE,
    NULL_SHIFT,
    ONLY_GENE,
    SHIFT_KEY,
    Groups,
    add_null,
    blocks,
    group_means,
    tabulate,
)
from transcriptformer.generation.gene_names import MAX_LISTED
from transcriptformer.generation.lists import read_genes
from transcriptformer.generation.matched import draw_matched, expression_in_groups
from transcriptformer.generation.null import check_null
from transcriptformer.generation.perturbations import ADDED_AT, make_perturbations
from transcriptformer.generation.picture import check_picture
from transcriptformer.generation.prompts import parse_gene_count
from transcriptformer.generation.shift_module import ShiftModule
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.output import open_result
from transcriptformer.runs.pooling import NO_GROUP
from transcriptformer.runs.recording import OnProgress
from transcriptformer.runs.run import Source, run_in_memory, run_on_files
from transcriptformer.runs.task import Results, Task
from transcriptformer.storage.atomic import atomic_write
from transcriptformer.storage.results import Field

if TYPE_CHECKING:
    from transcriptformer.runs.inputs import Inputs

logger = logging.getLogger(__name__)

NAMES_KEY, TABLE_KEY, LABELS_KEY = "perturbations", "perturbation_table", "perturbation_labels"
"""Keys of `uns`: names of the perturbations, their effects on groups of cells, and mean changes of probabilities."""

_MAX_CHANGES = 32
"""Perturbations per cell for which batches of cells need not be smaller, to be done within seconds."""


class Perturb(Task):
    """Shifts of cell embeddings by changes of single genes.

    Parameters
    ----------
    checkpoint
        Model and configuration.
    knock_out
        Genes, by id or symbol, each removed alone.
    set_counts
        Genes with the counts that each gets alone.
    at
        Where an absent gene is added to a cell: end or start.
    groupby
        Column of `obs`, for whose values effects are summarized.
    null
        Number of genes of like expression that each perturbation is compared with; 0: none.
    seed
        Seed of these genes and of the bootstrap.

    Raises
    ------
    UsageError
        If a gene, count or number is invalid, or the model is the baseline.
    """

    group_option, pooled_field = "--groupby", ""

    def __init__(
        self,
        checkpoint: Checkpoint,
        knock_out: Sequence[str] = (),
        set_counts: Sequence[tuple[str, float]] | Mapping[str, float] = (),
        at: str = "end",
        groupby: str | None = None,
        null: int = 0,
        seed: int = 0,
    ) -> None:
        if not isinstance(checkpoint.model, TranscriptFormer):
            raise UsageError("model.model_type esm2ce: the baseline has no order of genes; use transcriptformer")
        if at not in ADDED_AT:
            raise UsageError(f"--at {at}: must be {' or '.join(ADDED_AT)}")
        check_null(null, "--null")
        self.at, self.groupby, self.null, self.seed = at, groupby, null, seed
        require_ranges(self, "--", {"null": (0, 10_000), "seed": (0, MAX_INT)})
        self.perturbations = made = make_perturbations(checkpoint, knock_out, set_counts)
        self.tokens, self.counts = np.array([p.token for p in made]), np.array([p.new_count for p in made])
        layout = {SHIFT_KEY: Field("float32", len(made), may_be_missing=True), ONLY_GENE: Field("int32")}
        if null:
            layout[NULL_SHIFT] = Field("float32", self._n_nulls * len(made) * null, may_be_missing=True)
        if checkpoint.label_head is not None:
            width = len(made) * len(checkpoint.label_head.labels)
            layout[LABEL_CHANGE] = Field("float32", width, may_be_missing=True)
        super().__init__(checkpoint, layout)

    @property
    def _n_nulls(self) -> int:
        """Number of nulls of a cell: of all cells, and of its group."""
        return 1 if self.groupby is None else 2

    @property
    def settings(self) -> Mapping[str, object]:
        """What is perturbed, how it is summarized, and the null."""
        perturbations = [list(perturbation) for perturbation in self.perturbations]
        options = {"at": self.at, "groupby": self.groupby, "null": self.null, "seed": self.seed}
        return {"task": "perturb", "perturbations": perturbations, **options}

    @property
    def group_column(self) -> str | None:  # noqa: D102
        return self.groupby

    def limit_batches(self, limits: BatchLimits) -> BatchLimits:  # noqa: D102
        n = len(self.perturbations) * (1 + self._n_nulls * self.null)
        share = max(1, n // _MAX_CHANGES)
        return BatchLimits(max(1, limits.max_cells // share), max(1, limits.max_tokens // share))

    def prepare(self, inputs: "Inputs", survey: Survey) -> None:
        """Read the groups of the cells, and draw the genes of the null."""
        of_row, names = inputs.groups(survey)
        if self.groupby is None:
            self.groups = Groups(np.full_like(of_row, NO_GROUP), [])
        else:
            texts, codes = np.unique(names.astype(str), return_inverse=True)
            self.groups = Groups(np.where(of_row == NO_GROUP, NO_GROUP, codes[of_row]), texts.tolist())
        if self.null:
            data = self.checkpoint.config.model.data_config
            cells = CellDataset(inputs.readers, survey.kept, survey.lengths, data.block_size)
            expression = expression_in_groups(cells, self.groups, len(self.checkpoint.gene_vocab))
            self.null_tokens = draw_matched(expression, self.tokens, self.null, self.groups, self.seed)

    def requests(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the gene (cells, E) and new count (E,) of the perturbations of cells, then of the null."""
        tokens, counts = np.tile(self.tokens, (len(rows), 1)), self.counts
        if self.null:
            of_all = np.broadcast_to(self.null_tokens[:1], (len(rows), *self.null_tokens.shape[1:]))
            of_group = self.null_tokens[1 + self.groups.of_row[rows]]  # without a group, the first again
            nulls = np.stack([of_all, of_group][: self._n_nulls], axis=1).reshape(len(rows), -1)
            tokens = np.concatenate([tokens, nulls], axis=1)
            counts = np.concatenate([counts, np.tile(np.repeat(counts, self.null), self._n_nulls)])
        return tokens, counts

    def make_module(self) -> ShiftModule:  # noqa: D102
        return ShiftModule(self.checkpoint, self.requests, len(self.perturbations), self.at)

    def unstructured(self, results: Results) -> dict[str, Any]:
        """Return what is added to `uns`: names, the table of effects, and with a label head, that of its labels."""
        names, genes = [p.name for p in self.perturbations], self.checkpoint.gene_vocab.names()[self.tokens]
        table = tabulate(results, names, [str(gene) for gene in genes], self.tokens, self.groups, self.seed)
        _log_missing(table[table["group"] == ALL])
        if self.null:
            table = add_null(table, self._null_means(results).reshape(len(table), self.null))
        added = {NAMES_KEY: np.array(names, object), TABLE_KEY: table}
        return added if self.checkpoint.label_head is None else {**added, LABELS_KEY: self._label_table(results)}

    def _null_means(self, results: Results) -> np.ndarray:
        """Return the mean shift by each gene of the null (P, 1 + groups, null), each group by its own genes."""
        shape = 1 + len(self.groups.names), self._n_nulls, len(self.tokens), self.null
        means = group_means(results, NULL_SHIFT, self.groups).reshape(shape)
        return np.concatenate([means[:1, 0], means[1:, -1]]).swapaxes(0, 1)

    def _label_table(self, results: Results) -> pd.DataFrame:
        head = self.checkpoint.label_head
        assert head is not None
        groups, names = [ALL, *self.groups.names], [p.name for p in self.perturbations]
        means = group_means(results, LABEL_CHANGE, self.groups).reshape(len(groups), len(names), -1)
        rows = pd.MultiIndex.from_product([names, groups, head.labels], names=["perturbation", "group", "label"])
        return rows.to_frame(index=False).assign(mean_change=means.swapaxes(0, 1).ravel())

    def add_to(self, adata: anndata.AnnData, results: Results) -> None:  # noqa: D102
        adata.obsm[SHIFT_KEY] = results.read(SHIFT_KEY, 0, adata.n_obs)
        adata.uns.update(self.unstructured(results))

    def write(  # noqa: D102
        self,
        root: h5py.File | zarr.Group,
        n_cells: int,
        results: Results,
        obs_blocks: Callable[[], Iterator[pd.DataFrame]],
    ) -> None:
        stream = RowStream(root, f"obsm/{SHIFT_KEY}", n_cells)
        for cells in blocks(results, SHIFT_KEY, n_cells):
            stream.write(results.read(SHIFT_KEY, *cells))
        for key, value in self.unstructured(results).items():
            anndata.io.write_elem(root, f"uns/{key}", value)

    def pooled(self, table: pd.DataFrame, means: np.ndarray) -> anndata.AnnData:  # noqa: D102
        raise NotImplementedError("perturbations are not pooled")


def _log_missing(table: pd.DataFrame) -> None:
    """Log perturbations without a result in any cell, or in cells of one gene."""
    unexpressed = table["perturbation"][table["n_expressing"] == 0]
    if len(unexpressed):
        more = f" and {len(unexpressed) - MAX_LISTED} more" if len(unexpressed) > MAX_LISTED else ""
        logger.warning("no cell expresses: %s%s", ", ".join(unexpressed[:MAX_LISTED]), more)
    for name, n in table.loc[table["n_emptied"] > 0, ["perturbation", "n_emptied"]].itertuples(index=False):
        logger.warning("no genes are left in %d cells by %s; their shifts are missing", n, name)


def describe(path: Path) -> str:
    """Summarize a result in one line."""
    with open_result(path) as root:
        n_cells, n = root["obsm"][SHIFT_KEY].shape
    return f"{n_cells} cells, {n} perturbations: obsm['{SHIFT_KEY}'], uns['{TABLE_KEY}']"


def read_table(path: Path) -> pd.DataFrame:
    """Read the effects on groups of cells from a result."""
    with open_result(path) as root:
        table: pd.DataFrame = anndata.io.read_elem(root[f"uns/{TABLE_KEY}"])
    return table


def perturb(
    sources: Source | Sequence[Source],
    checkpoint: Checkpoint,
    knock_out: Sequence[str] = (),
    set_counts: Mapping[str, float] | None = None,
    at: str = "end",
    groupby: str | None = None,
    null: int = 0,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> anndata.AnnData:
    """Perturb the cells of one or more sources in memory; parameters and errors as for `Perturb`, `run_in_memory`."""
    task = Perturb(checkpoint, knock_out, set_counts or {}, at, groupby, null, seed)
    return run_in_memory(sources, task, on_progress)


@dataclass(frozen=True)
class Options:
    """Options of the command that say what is perturbed and compared; named like them."""

    knock_out: Sequence[str] = ()
    knock_out_each: Path | None = None
    set: Sequence[str] = ()
    at: str = "end"
    groupby: str | None = None
    null: int = 0
    seed: int = 0
    plot: Path | None = None

    def make_task(self, checkpoint: Checkpoint) -> Perturb:
        """Return the task; errors as for `Perturb`, `read_genes` and `parse_gene_count`."""
        listed = [] if self.knock_out_each is None else read_genes(self.knock_out_each, "--knock-out-each")
        without = [text for text in self.set if "=" not in text]
        if without:
            raise UsageError(f"--set {without[0]}: has no count; give GENE=COUNT")
        pairs = [parse_gene_count(text, "--set") for text in self.set]
        knock_out = [*self.knock_out, *listed]
        return Perturb(checkpoint, knock_out, pairs, self.at, self.groupby, self.null, self.seed)


def run(
    names: Sequence[Location],
    checkpoint_path: Path,
    config: Config,
    options: Options,
    on_progress: OnProgress | None = None,
) -> Path | None:
    """Run `transcriptformer perturb`; the table is also written as CSV beside the output, and drawn if asked for.

    Returns and raises what `run_on_files` does.
    """
    if options.plot is not None:
        check_picture(options.plot)
    output = run_on_files(names, checkpoint_path, config, options.make_task, on_progress)
    if output is not None:
        table = read_table(output)
        with atomic_write(table_path(output)) as temporary:
            table.to_csv(temporary, index=False)
        if options.plot is not None:
            draw(table, options.plot)
    return output


def table_path(output: Path) -> Path:
    """Return the path of the table that is written beside an output."""
    return output.with_suffix(".csv")
