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
import torch
import zarr
from torch import Tensor
from torch.nn.functional import normalize

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.config import MAX_INT, Config, require_ranges
from transcriptformer.data.batches import Batch, BatchLimits, CellDataset, group_by_length
from transcriptformer.data.row_stream import RowStream
from transcriptformer.data.store import Location
from transcriptformer.data.survey import Survey
from transcriptformer.errors import UsageError
from transcriptformer.generation.dot_plot import draw
from transcriptformer.generation.effects import (
    ALL,
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
from transcriptformer.generation.heatmap import check_picture
from transcriptformer.generation.lists import read_genes
from transcriptformer.generation.matched import draw_matched, expression_in_groups
from transcriptformer.generation.null import check_null
from transcriptformer.generation.perturbations import ADDED_AT, make_perturbations
from transcriptformer.generation.perturbed_cells import Cells, Changes, changed, plan
from transcriptformer.generation.prompts import parse_gene_count
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.batch_size import batch_limits
from transcriptformer.runs.module import EncoderModule
from transcriptformer.runs.output import open_result
from transcriptformer.runs.pooling import NO_GROUP
from transcriptformer.runs.recording import OnProgress
from transcriptformer.runs.run import Source, run_in_memory, run_on_files
from transcriptformer.runs.task import Prediction, Results, Task
from transcriptformer.runtime.memory import Halving
from transcriptformer.storage.atomic import atomic_write, check_writable
from transcriptformer.storage.results import ROWS, Field

if TYPE_CHECKING:
    from transcriptformer.runs.inputs import Inputs

logger = logging.getLogger(__name__)

NAMES_KEY, TABLE_KEY, LABELS_KEY = "perturbations", "perturbation_table", "perturbation_labels"
"""Keys of `uns`: names of the perturbations, their effects on groups of cells, and mean changes of probabilities."""

_LABEL_CHANGE = "label_change"

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
            layout[_LABEL_CHANGE] = Field("float32", width, may_be_missing=True)
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

    def make_module(self) -> "PerturbModule":  # noqa: D102
        return PerturbModule(self)

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
        means = group_means(results, _LABEL_CHANGE, self.groups).reshape(len(groups), len(names), -1)
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


class PerturbModule(EncoderModule):
    """Embeds cells, and their perturbed copies where the model's input changes."""

    def __init__(self, task: Perturb) -> None:
        model = task.checkpoint.model
        assert isinstance(model, TranscriptFormer)
        super().__init__(model, task.checkpoint.config.model.inference_config)
        self.task, self.label_head = task, task.checkpoint.label_head
        advice = "use another device or --precision 16-mixed"
        self.embed_copies = Halving(self._embed, Batch.size, Batch.halves, _join, "perturbed cell", advice)

    def prepare(self, lengths: np.ndarray, device: torch.device) -> None:  # noqa: D102
        super().prepare(lengths, device)
        self.limits = batch_limits(self.task.checkpoint)

    def predict(self, batch: Batch) -> Prediction:  # noqa: D102
        task, n = self.task, len(self.task.perturbations)
        genes, counts = batch.gene_tokens.cpu().numpy(), batch.gene_counts.cpu().numpy()
        cells = Cells(genes, counts, self.model.pad, self.model.config.seq_len)
        known, changes, change_of = plan(cells, *task.requests(batch.rows.cpu().numpy()), task.at)
        original = self._embed(batch)
        shifts, labels = self._shifts(batch, cells, changes, original)
        only = np.where(cells.n_genes == 1, genes[:, 0], -1)
        prediction = {ROWS: batch.rows, ONLY_GENE: torch.from_numpy(only).to(batch.rows.device)}
        prediction[SHIFT_KEY] = _of_cells(shifts, known[:, :n], change_of[:, :n])
        if task.null:
            prediction[NULL_SHIFT] = _of_cells(shifts, known[:, n:], change_of[:, n:])
        if labels is not None:
            prediction[_LABEL_CHANGE] = _of_cells(labels, known[:, :n], change_of[:, :n])
        return prediction

    def _shifts(self, batch: Batch, cells: Cells, changes: Changes, original: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the shift by each change (K,), and the change of each label's probability (K, labels), if any."""
        n_genes = cells.n_genes[changes.cells] + changes.steps
        min_positions, device = self.task.checkpoint.min_positions, batch.rows.device
        shifts, labels = original.new_empty(len(n_genes)), None
        if self.label_head is not None:
            labels, probabilities = (
                original.new_empty(len(n_genes), len(self.label_head.labels)),
                self._labels(original),
            )
        for chosen in group_by_length(n_genes, self.limits, cells.seq_len, min_positions):
            genes, counts = (
                torch.from_numpy(v).to(device) for v in changed(cells, changes.take(chosen), min_positions)
            )
            indices, of_cell = (torch.from_numpy(v).to(device) for v in (chosen, changes.cells[chosen]))
            perturbed = self.embed_copies(Batch(indices, genes, counts, batch.aux_tokens[of_cell]))
            shifts[indices] = cosine_shift(original[of_cell], perturbed)
            if labels is not None:
                labels[indices] = self._labels(perturbed) - probabilities[of_cell]
        return shifts, labels

    def _embed(self, batch: Batch) -> Tensor:
        """Return the embeddings of cells (B, D), float32, as of `inference`."""
        layer = self.inference.embedding_layer_index
        encoded = self.model(batch.gene_tokens, batch.gene_counts, batch.aux_tokens, layer=layer, bias_on_diagonal=True)
        return self.model.cell_embedding(encoded).float()

    def _labels(self, embeddings: Tensor) -> Tensor:
        assert self.label_head is not None
        return self.label_head(embeddings).softmax(1)


def _of_cells(values: Tensor, known: np.ndarray, change_of: np.ndarray) -> Tensor:
    """Return the values (K, …) of the changes of each cell (B, E · …), and `known` (B, E) where there is no change."""
    indices = torch.from_numpy(change_of).to(values.device)
    padded = torch.cat([values, values.new_zeros(1, *values.shape[1:])])  # which -1 points to
    is_changed, unchanged = indices >= 0, torch.from_numpy(known).to(values)
    for _ in values.shape[1:]:
        is_changed, unchanged = is_changed[..., None], unchanged[..., None]
    return torch.where(is_changed, padded[indices], unchanged).flatten(1)


def _join(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second])


def cosine_shift(original: Tensor, perturbed: Tensor) -> Tensor:
    """Return 1 − cos of embeddings (B, D) and those after a perturbation (B,); infinite where one is NaN.

    It is half the squared distance of the normalized vectors, because 1 − cos would cancel for small shifts.
    """
    shift = (normalize(original, dim=1) - normalize(perturbed, dim=1)).square().sum(1) / 2
    return shift.nan_to_num(nan=torch.inf, posinf=torch.inf)  # NaN stands for missing


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
        check_writable(options.plot, "--plot")
    output = run_on_files(names, checkpoint_path, config, options.make_task, on_progress)
    if output is not None:
        table = read_table(output)
        with atomic_write(table_path(output)) as temporary:
            table.to_csv(temporary, index=False)
        if options.plot is not None:
            with atomic_write(options.plot) as temporary:
                draw(table, temporary, options.plot.suffix[1:].lower())
    return output


def table_path(output: Path) -> Path:
    """Return the path of the table that is written beside an output."""
    return output.with_suffix(".csv")
