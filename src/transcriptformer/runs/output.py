"""Results as AnnData: in memory, in an h5ad file or in a zarr store; and their provenance."""

import asyncio
import errno
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from zarr.core.sync import sync

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.row_stream import RowStream, preserved_strings
from transcriptformer.data.store import Location
from transcriptformer.errors import DataError, OutputError, one_line
from transcriptformer.runs.task import Results, Task
from transcriptformer.storage.atomic import atomic_folder, atomic_write
from transcriptformer.storage.hdf5 import new_hdf5

PROVENANCE_KEY = "transcriptformer"
GENE_COLUMN, N_CELLS_COLUMN = "gene", "n_cells"


def select_columns(columns: Sequence[str], obs_keys: Sequence[str]) -> list[str]:
    """Select the columns of `obs` to write, in file order; `all` selects every column.

    Raises
    ------
    DataError
        If a column is missing.
    """
    if "all" in obs_keys:
        return list(columns)
    missing = [key for key in obs_keys if key not in columns]
    if missing:
        raise DataError(
            f"model.inference_config.obs_keys: obs has no column {', '.join(map(repr, missing))}; "
            f"its columns are: {', '.join(map(str, columns)) or 'none'}"
        )
    return [column for column in columns if column in obs_keys]


def to_anndata(obs: pd.DataFrame, task: Task, results: Results, provenance: Mapping[str, object]) -> anndata.AnnData:
    """Combine the results of a task and cell metadata in memory."""
    obs = obs.assign(**task.values_of_columns(results, 0, len(obs)))
    with anndata.settings.override(check_uniqueness=False):  # the survey has warned
        adata = anndata.AnnData(obs=obs, uns={PROVENANCE_KEY: dict(provenance)})
    task.add_to(adata, results)
    return adata


def write_cells(
    path: Path,
    n_cells: int,
    obs_blocks: Callable[[], Iterator[pd.DataFrame]],
    task: Task,
    results: Results,
    provenance: Mapping[str, object],
) -> None:
    """Write the results of a task and cell metadata block by block; memory use does not depend on the number of cells.

    Parameters
    ----------
    obs_blocks
        Returns an iterator over the metadata of the cells in blocks, in order.

    Raises
    ------
    OutputError
        If the disk is full or the folder cannot be written to; `path` is not created then.
    """
    with new_anndata(path) as root:
        anndata.io.write_elem(root, f"uns/{PROVENANCE_KEY}", dict(provenance))
        obs = RowStream(root, "obs", n_cells)
        start = 0
        for block in obs_blocks():
            stop = start + len(block)
            obs.write(block.assign(**task.values_of_columns(results, start, stop)))
            start = stop
        task.write(root, n_cells, results, obs_blocks)


def pooled_to_anndata(
    task: Task, table: pd.DataFrame, means: np.ndarray, provenance: Mapping[str, object]
) -> anndata.AnnData:
    """Return the result of a pool of a task: one row per gene, or per gene and group, with its number of cells."""
    adata = task.pooled(table, means)
    adata.uns[PROVENANCE_KEY] = dict(provenance)
    return adata


def write_anndata(adata: anndata.AnnData, path: Path) -> None:
    """Write an in-memory result."""
    with new_anndata(path) as root:
        anndata.io.write_elem(root, "/", adata)


def provenance_of(
    sources: Sequence[Location | anndata.AnnData],
    checkpoint: Checkpoint,
    weights_sha256: str,
    inferred: Sequence[Mapping[str, object]],
    identity: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Provenance of a result.

    Parameters
    ----------
    inferred
        What was inferred about each source.
    identity
        Identity of the run, by which a later run recognizes the result as complete.
    """
    names = ["AnnData" if isinstance(source, anndata.AnnData) else str(source) for source in sources]
    return {
        "version": version("transcriptformer"),
        "checkpoint": checkpoint.path.resolve().name,
        "weights_sha256": weights_sha256,
        "config": checkpoint.config.to_json(),
        # Paths may contain invalid Unicode, which HDF5 cannot store.
        "data_files": [name.encode(errors="replace").decode() for name in names],
        "inferred": json.dumps(list(inferred)),
        **({} if identity is None else {"run": json.dumps(identity)}),
    }


def read_provenance(path: Path) -> dict[str, Any] | None:
    """Read the provenance of a result; None if `path` is not one.

    Raises
    ------
    OutputError
        If it cannot be read, such as because another program has it open.
    """
    try:
        with open_result(path) as root:
            provenance = anndata.io.read_elem(root[f"uns/{PROVENANCE_KEY}"])
    except Exception as error:  # h5py, zarr and anndata raise various errors for other files
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise OutputError(f"{path}: cannot be read ({one_line(error)})") from error
        return None
    return provenance if isinstance(provenance, dict) else None


@contextmanager
def open_result(path: Path) -> Iterator[Any]:
    """Open a result to read; yields the root group."""
    if path.is_dir():
        yield zarr.open_group(str(path), mode="r")
    else:
        with h5py.File(path) as file:
            yield file


@contextmanager
def new_anndata(path: Path) -> Iterator[h5py.File | zarr.Group]:
    """Create an empty AnnData to write to; otherwise like `new_file`."""
    with preserved_strings(), new_file(path) as root:
        anndata.io.write_elem(root, "/", anndata.AnnData(obs=pd.DataFrame(index=pd.Index([], dtype=str))))
        yield root
        if isinstance(root, zarr.Group):
            zarr.consolidate_metadata(root.store)


@contextmanager
def new_file(path: Path) -> Iterator[h5py.File | zarr.Group]:
    """Create an HDF5 file or zarr store under a temporary name; renamed on success, removed on failure.

    Raises
    ------
    OutputError
        If the disk is full or the folder cannot be written to.
    """
    if path.suffix == ".zarr":
        with atomic_folder(path) as folder:
            try:
                yield zarr.open_group(str(folder), mode="w", zarr_format=anndata.settings.zarr_write_format)
            finally:
                _await_zarr()
    else:
        with atomic_write(path) as temporary, new_hdf5(temporary) as file:
            yield file


def _await_zarr() -> None:
    """Wait for pending zarr writes: a failed write does not cancel concurrent ones."""

    async def others() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)

    sync(others())
