"""What a run computes for each cell, and what its result holds."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import anndata
import h5py
import numpy as np
import pandas as pd
import torch
import zarr
from torch import Tensor, nn

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.batches import Batch, BatchLimits
from transcriptformer.data.survey import Survey
from transcriptformer.runtime.memory import Halving
from transcriptformer.storage.results import Layout

if TYPE_CHECKING:
    from transcriptformer.runs.inputs import Inputs

ALL_CELLS = "gene"
"""Value of `Task.pool` that pools all cells into one group."""

Prediction = Mapping[str, Tensor]
"""Results of a batch of B cells, by field: `rows` (B,), the index of each cell among the kept cells; values of cells
(B, …); and values of genes (B, L, …), of which only the first `n_genes` (B,) per cell are valid. (Removing the others
before they are recorded would synchronize a GPU.)"""


class Results(Protocol):
    """Results of all kept cells, in order.

    Attributes
    ----------
    layout
        Layout of the available results.
    """

    layout: Layout

    @property
    def n_genes(self) -> np.ndarray:
        """Number of gene records of each cell (cells,)."""
        ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read the per-cell records of cells `start:stop`."""
        ...

    def read_genes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read the per-gene records of cells `start:stop`, cell by cell."""
        ...


class CellModule(nn.Module):
    """Runs a model on batches; batches that run out of memory are halved."""

    def __init__(self) -> None:
        super().__init__()
        advice = "use another device or --precision 16-mixed"
        self.halving = Halving(self.predict, Batch.size, Batch.halves, _join, "cell", advice)

    def forward(self, batch: Batch) -> Prediction:
        """Predict a batch; one that runs out of memory is halved, as are later ones of its size."""
        return self.halving(batch)

    def prepare(self, lengths: np.ndarray, device: torch.device) -> None:
        """Prepare for a run on a device, given the number of genes of each cell (cells,)."""

    def predict(self, batch: Batch) -> Prediction:
        """Predict a batch as a whole."""
        raise NotImplementedError


def _join(first: Prediction, second: Prediction) -> Prediction:
    return {name: torch.cat([values, second[name]]) for name, values in first.items()}


class Task(ABC):
    """What a run computes for each cell, and what its result holds.

    Parameters
    ----------
    checkpoint
        Model and configuration.
    layout
        Fields of the results.
    pool
        None: results of cells; `gene`: means per gene over all cells; a column of `obs`: per gene and value of it.

    Attributes
    ----------
    group_option
        Option that sets the column of groups, for messages.
    pooled_field
        Field of the layout whose records are averaged.
    """

    group_option: str
    pooled_field: str

    def __init__(self, checkpoint: Checkpoint, layout: Layout, pool: str | None = None) -> None:
        self.checkpoint, self.layout, self.pool = checkpoint, layout, pool

    @property
    def settings(self) -> Mapping[str, object]:
        """What determines the results besides the configuration; in JSON types."""
        return {}

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns that are added to `obs`."""
        return ()

    @property
    def group_column(self) -> str | None:
        """Column of `obs` whose values group the cells, if any."""
        return None if self.pool == ALL_CELLS else self.pool

    def prepare(self, inputs: "Inputs", survey: Survey) -> None:
        """Prepare for the cells of a run, in each process; called once, before `make_module`."""
        return

    def limit_batches(self, limits: BatchLimits) -> BatchLimits:
        """Return the limits on batches of cells, given those on what the model runs on at once."""
        return limits

    @abstractmethod
    def make_module(self) -> CellModule:
        """Return the module that computes the fields of the layout."""

    def values_of_columns(self, results: Results, start: int, stop: int) -> dict[str, Any]:
        """Return the columns that are added to `obs` for cells `start:stop`."""
        return {}

    @abstractmethod
    def add_to(self, adata: anndata.AnnData, results: Results) -> None:
        """Add the results of all cells to an AnnData in memory, besides columns of `obs`."""

    @abstractmethod
    def write(
        self,
        root: h5py.File | zarr.Group,
        n_cells: int,
        results: Results,
        obs_blocks: Callable[[], Iterator[pd.DataFrame]],
    ) -> None:
        """Write the results of all cells to a stored AnnData block by block, besides columns of `obs`."""

    @abstractmethod
    def pooled(self, table: pd.DataFrame, means: np.ndarray) -> anndata.AnnData:
        """Return the result of a pool.

        Parameters
        ----------
        table
            Gene, group and number of cells of each row.
        means
            Mean of `pooled_field` (rows, width), float32.
        """
