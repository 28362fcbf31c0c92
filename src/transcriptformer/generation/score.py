"""Likelihoods of real cells: how surprising the model finds their genes and counts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import torch
import zarr
from torch import Tensor

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.config import MAX_INT, Config, require_ranges
from transcriptformer.data.batches import Batch
from transcriptformer.data.metadata import n_rows
from transcriptformer.data.store import Location
from transcriptformer.generation.prompts import require_gene_head
from transcriptformer.model.losses import count_surprise
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.module import EncoderModule
from transcriptformer.runs.output import GENE_COLUMN, open_result
from transcriptformer.runs.recording import OnProgress
from transcriptformer.runs.run import Source, run_in_memory, run_on_files
from transcriptformer.runs.task import Prediction, Results, Task
from transcriptformer.storage.results import N_GENES, ROWS, Field, Layout

SURPRISE = "surprise"
"""Field of −log p of each gene and of its count."""

_OF_CELL = ("gene_nll", "count_nll")

COLUMNS = (*_OF_CELL, "perplexity", *(f"{name}_se" for name in _OF_CELL))
"""All columns that scores may have."""


class Score(Task):
    """Negative log-likelihoods of a cell's genes and counts, in nats.

    Parameters
    ----------
    checkpoint
        Model with a gene head, and configuration.
    orders
        Number of random orders of a cell's genes over which likelihoods are averaged; 0: the order of the file.
    per_gene
        None: means over each cell's genes; otherwise means per gene over cells, as `pool` of `Task`.
    seed
        Seed of the orders.

    Raises
    ------
    TranscriptFormerError
        If the model has no gene head for its genes, or a number is out of range.
    """

    group_option, pooled_field = "--per-gene", SURPRISE

    def __init__(self, checkpoint: Checkpoint, orders: int = 1, per_gene: str | None = None, seed: int = 0) -> None:
        require_gene_head(checkpoint)
        self.orders, self.seed = orders, seed
        require_ranges(self, "--", {"orders": (0, 1000), "seed": (0, MAX_INT)})
        super().__init__(checkpoint, _layout(orders, per_gene is not None), per_gene)

    @property
    def settings(self) -> Mapping[str, object]:
        """Number and seed of the orders."""
        return {"task": "score", "orders": self.orders, "per_gene": self.pool, "seed": self.seed}

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns that are added to `obs`; columns of other numbers of orders do not stay beside them."""
        return () if self.pool is not None else COLUMNS

    def make_module(self) -> "ScoreModule":  # noqa: D102
        return ScoreModule(self)

    def values_of_columns(self, results: Results, start: int, stop: int) -> dict[str, Any]:  # noqa: D102
        values: dict[str, Any] = {name: results.read(name, start, stop) for name in self.layout}
        return {**values, "perplexity": np.exp(values["gene_nll"])}

    def add_to(self, adata: anndata.AnnData, results: Results) -> None:
        """Do nothing; all results are columns."""

    def write(
        self,
        root: h5py.File | zarr.Group,
        n_cells: int,
        results: Results,
        obs_blocks: Callable[[], Iterator[pd.DataFrame]],
    ) -> None:
        """Do nothing; all results are columns."""

    def pooled(self, table: pd.DataFrame, means: np.ndarray) -> anndata.AnnData:  # noqa: D102
        return anndata.AnnData(obs=table.assign(**dict(zip(_OF_CELL, means.T, strict=True))))


def _layout(orders: int, per_gene: bool) -> Layout:
    if per_gene:
        return {
            N_GENES: Field("int32"),
            "genes": Field("int32", per_gene=True),
            SURPRISE: Field("float32", 2, per_gene=True),
        }
    names = [*_OF_CELL, *(f"{name}_se" for name in _OF_CELL if orders > 1)]
    return {name: Field("float32", of_genes=True) for name in names}


class ScoreModule(EncoderModule):
    """Computes the likelihoods that a `Score` asks for."""

    def __init__(self, task: Score) -> None:
        model, config = task.checkpoint.model, task.checkpoint.config.model
        assert isinstance(model, TranscriptFormer)
        super().__init__(model, config.inference_config)
        self.task, self.clip_counts = task, config.data_config.clip_counts

    def predict(self, batch: Batch) -> Prediction:  # noqa: D102
        n = self.model.max_genes
        batch = batch._replace(gene_tokens=batch.gene_tokens[:, :n], gene_counts=batch.gene_counts[:, :n])
        n_genes = (batch.gene_tokens != self.model.pad).sum(1)
        total = torch.zeros(*batch.gene_tokens.shape, 2, device=batch.rows.device)
        of_cells = []
        for order in self._orders(batch):
            surprise = self._surprise(batch, order)  # (B, L, 2)
            total += surprise
            of_cells.append(surprise.sum(1) / n_genes[:, None])  # (B, 2); NaN without genes
        means = torch.stack(of_cells)  # (orders, B, 2)
        if self.task.pool is not None:
            return {ROWS: batch.rows, N_GENES: n_genes, "genes": batch.gene_tokens, SURPRISE: total / len(means)}
        prediction = {ROWS: batch.rows, **dict(zip(_OF_CELL, means.mean(0).T, strict=True))}
        if len(means) > 1:
            errors = means.std(0) / len(means) ** 0.5
            prediction |= {f"{name}_se": values for name, values in zip(_OF_CELL, errors.T, strict=True)}
        return prediction

    def _orders(self, batch: Batch) -> Iterator[Tensor]:
        """Yield permutations (B, L) of the genes of each cell, which depend on its row, not on its batch."""
        rows, n_genes = batch.rows.tolist(), (batch.gene_tokens != self.model.pad).sum(1).tolist()
        for number in range(max(1, self.task.orders)):
            order = np.tile(np.arange(batch.gene_tokens.shape[1]), (len(rows), 1))
            if self.task.orders:
                for i, (row, n) in enumerate(zip(rows, n_genes, strict=True)):
                    order[i, :n] = np.random.default_rng((self.task.seed, row, number)).permutation(n)
            yield torch.from_numpy(order).to(batch.rows.device)

    def _surprise(self, batch: Batch, order: Tensor) -> Tensor:
        """Return −log p of each gene and of its count (B, L, 2), in the order of the batch; 0 without a gene."""
        genes, counts = batch.gene_tokens.gather(1, order), batch.gene_counts.gather(1, order)
        encoded = self.model(genes, counts, batch.aux_tokens)
        of_counts = count_surprise(self.model.expected_counts(encoded), counts.clamp(max=self.clip_counts))
        of_counts = of_counts.masked_fill(~encoded.is_gene, 0)
        losses = torch.stack([self.model.gene_losses(encoded), of_counts], -1)  # (B, L, 2)
        return torch.zeros_like(losses).scatter(1, order[..., None].expand_as(losses), losses)


def describe(path: Path) -> str:
    """Summarize a result in one line."""
    with open_result(path) as root:
        obs = root["obs"]
        n, kind = n_rows(obs[obs.attrs["_index"]]), "gene rows" if GENE_COLUMN in obs else "cells"
        found = [name for name in (*_OF_CELL, "perplexity") if name in obs]
    return f"{n} {kind}: obs {', '.join(found)}"


def score(
    sources: Source | Sequence[Source],
    checkpoint: Checkpoint,
    orders: int = 1,
    per_gene: str | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> anndata.AnnData:
    """Score the cells of one or more sources in memory; parameters and errors as for `Score` and `run_in_memory`."""
    return run_in_memory(sources, Score(checkpoint, orders, per_gene, seed), on_progress)


def run(
    names: Sequence[Location],
    checkpoint_path: Path,
    config: Config,
    orders: int = 1,
    per_gene: str | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Path | None:
    """Run `transcriptformer score`; parameters and errors as for `Score` and `run_on_files`."""
    return run_on_files(
        names, checkpoint_path, config, lambda checkpoint: Score(checkpoint, orders, per_gene, seed), on_progress
    )
