"""Results as AnnData: in memory, in an h5ad file or in a zarr store. Defines all output keys."""

import asyncio
import errno
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from zarr.core.sync import sync

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.metadata import n_rows
from transcriptformer.data.row_stream import RowStream, preserved_strings
from transcriptformer.data.store import Location
from transcriptformer.errors import DataError, OutputError, one_line
from transcriptformer.model.label_head import LabelHead
from transcriptformer.storage.atomic import atomic_folder, atomic_write
from transcriptformer.storage.hdf5 import new_hdf5
from transcriptformer.storage.results import LABEL, LABEL_PROBABILITY, Layout

EMBEDDINGS_KEY, LLH_KEY, PROVENANCE_KEY = "embeddings", "llh", "transcriptformer"
CGE_KEY, CGE_CELLS_KEY, CGE_GENES_KEY = "cge_embeddings", "cge_cell_indices", "cge_gene_names"
GENE_COLUMN, N_CELLS_COLUMN = "gene", "n_cells"

BLOCK_BYTES = 2**23
"""Approximate size of the blocks in which results are copied."""


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


def to_anndata(
    obs: pd.DataFrame,
    results: Results,
    gene_names: np.ndarray,
    provenance: Mapping[str, object],
    label_head: LabelHead | None = None,
) -> anndata.AnnData:
    """Combine results and cell metadata in memory.

    Parameters
    ----------
    gene_names
        Name of each gene token (tokens,).
    label_head
        Label head of the checkpoint, if any.
    """
    n_cells, layout = len(obs), results.layout
    obs = obs.assign(**predicted_labels(results, 0, n_cells, label_head))
    with anndata.settings.override(check_uniqueness=False):  # the survey has warned
        adata = anndata.AnnData(obs=obs, uns={PROVENANCE_KEY: dict(provenance)})
    if "embeddings" in layout:
        adata.obsm[EMBEDDINGS_KEY] = results.read("embeddings", 0, n_cells)
    if "llh" in layout:
        adata.uns[LLH_KEY] = pd.DataFrame({LLH_KEY: results.read("llh", 0, n_cells)}, index=obs.index.rename(None))
    if "cge_embeddings" in layout:
        adata.uns[CGE_KEY] = results.read_genes("cge_embeddings", 0, n_cells)
        adata.uns[CGE_CELLS_KEY] = np.repeat(np.arange(n_cells), results.n_genes)
        adata.uns[CGE_GENES_KEY] = gene_names[results.read_genes("genes", 0, n_cells)]
    return adata


def write_cells(
    path: Path,
    n_cells: int,
    obs_blocks: Callable[[], Iterator[pd.DataFrame]],
    results: Results,
    gene_names: np.ndarray,
    provenance: Mapping[str, object],
    label_head: LabelHead | None = None,
) -> None:
    """Write results and cell metadata block by block; memory use does not depend on the number of cells.

    Parameters
    ----------
    obs_blocks
        Returns an iterator over the metadata of the cells in blocks, in order.
    gene_names
        Name of each gene token (tokens,).
    label_head
        Label head of the checkpoint, if any.

    Raises
    ------
    OutputError
        If the disk is full or the folder cannot be written to; `path` is not created then.
    """
    layout = results.layout
    with new_anndata(path) as root:
        anndata.io.write_elem(root, f"uns/{PROVENANCE_KEY}", dict(provenance))
        obs = RowStream(root, "obs", n_cells)
        start = 0
        for block in obs_blocks():
            stop = start + len(block)
            obs.write(block.assign(**predicted_labels(results, start, stop, label_head)))
            start = stop
        if "embeddings" in layout:
            stream = RowStream(root, f"obsm/{EMBEDDINGS_KEY}", n_cells)
            step = max(1, BLOCK_BYTES // layout["embeddings"].record_bytes)
            for start in range(0, n_cells, step):
                stream.write(results.read("embeddings", start, min(start + step, n_cells)))
        if "llh" in layout:
            stream, start = RowStream(root, f"uns/{LLH_KEY}", n_cells), 0
            for block in obs_blocks():
                values = results.read("llh", start, start + len(block))
                stream.write(pd.DataFrame({LLH_KEY: values}, index=block.index.rename(None)))
                start += len(block)
        if "cge_embeddings" in layout:
            _write_gene_embeddings(root, results, gene_names)


def predicted_labels(results: Results, start: int, stop: int, label_head: LabelHead | None) -> dict[str, Any]:
    """Columns of `obs` for cells `start:stop`: the predicted label and its probability."""
    if label_head is None or LABEL not in results.layout:
        return {}
    values = (
        pd.Categorical.from_codes(results.read(LABEL, start, stop), pd.Index(label_head.labels)),
        results.read(LABEL_PROBABILITY, start, stop),
    )
    return dict(zip(label_columns(results.layout, label_head), values, strict=True))


def label_columns(layout: Layout, label_head: LabelHead | None) -> list[str]:
    """Names of the columns of predicted labels, if any."""
    if label_head is None or LABEL not in layout:
        return []
    column = f"predicted_{label_head.column}"
    return [column, f"{column}_probability"]


def _write_gene_embeddings(root: h5py.File | zarr.Group, results: Results, gene_names: np.ndarray) -> None:
    n_genes = results.n_genes
    embeddings, cells, genes = (
        RowStream(root, f"uns/{key}", int(n_genes.sum())) for key in (CGE_KEY, CGE_CELLS_KEY, CGE_GENES_KEY)
    )
    max_genes = max(1, BLOCK_BYTES // results.layout["cge_embeddings"].record_bytes)
    for start, stop in _gene_blocks(n_genes, max_genes):
        embeddings.write(results.read_genes("cge_embeddings", start, stop))
        cells.write(np.repeat(np.arange(start, stop), n_genes[start:stop]))
        genes.write(gene_names[results.read_genes("genes", start, stop)])


def pooled_to_anndata(table: pd.DataFrame, means: np.ndarray, provenance: Mapping[str, object]) -> anndata.AnnData:
    """Pooled contextual gene embeddings: one row per gene, or per gene and group, with its number of cells."""
    return anndata.AnnData(obs=table, obsm={EMBEDDINGS_KEY: means}, uns={PROVENANCE_KEY: dict(provenance)})


def to_gene_rows(result: anndata.AnnData) -> anndata.AnnData:
    """Convert contextual gene embeddings from `to_anndata` to an AnnData with one row per gene and cell."""
    cell_index = result.uns[CGE_CELLS_KEY]
    obs = pd.DataFrame(
        {
            "cell": pd.Categorical.from_codes(cell_index, result.obs_names)
            if result.obs_names.is_unique
            else result.obs_names.to_numpy()[cell_index],
            "cell_index": cell_index,
            GENE_COLUMN: pd.Categorical(result.uns[CGE_GENES_KEY]),
        },
        index=pd.RangeIndex(len(cell_index)).astype(str),
    )
    embeddings = {EMBEDDINGS_KEY: result.uns[CGE_KEY]}
    return anndata.AnnData(obs=obs, obsm=embeddings, uns={PROVENANCE_KEY: result.uns[PROVENANCE_KEY]})


def write_anndata(adata: anndata.AnnData, path: Path) -> None:
    """Write an in-memory result."""
    with new_anndata(path) as root:
        anndata.io.write_elem(root, "/", adata)


def describe(path: Path) -> str:
    """Summarize the contents of a result in one line."""
    with _open_result(path) as root:
        obs, uns = root["obs"], root["uns"]
        stored = [f"obsm['{key}'] {tuple(root['obsm'][key].shape)}" for key in root["obsm"]]
        stored += [f"uns['{CGE_KEY}'] {tuple(uns[CGE_KEY].shape)}"] if CGE_KEY in uns else []
        stored += [f"uns['{LLH_KEY}']"] if LLH_KEY in uns else []
        rows = n_rows(obs[obs.attrs["_index"]])
    config = json.loads((read_provenance(path) or {}).get("config", "{}"))
    is_pooled = config and config["model"]["inference_config"]["cge_pool"] is not None
    return f"{rows} {'gene rows' if is_pooled else 'cells'}: {', '.join(stored)}"


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
        with _open_result(path) as root:
            provenance = anndata.io.read_elem(root[f"uns/{PROVENANCE_KEY}"])
    except Exception as error:  # h5py, zarr and anndata raise various errors for other files
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise OutputError(f"{path}: cannot be read ({one_line(error)})") from error
        return None
    return provenance if isinstance(provenance, dict) else None


@contextmanager
def _open_result(path: Path) -> Iterator[Any]:
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


def _gene_blocks(n_genes: np.ndarray, max_genes: int) -> Iterator[tuple[int, int]]:
    """Iterate over ranges of consecutive cells, at least one, with about `max_genes` genes in total."""
    ends = np.cumsum(n_genes, dtype=np.int64)
    if ends[-1] == 0:
        yield 0, len(n_genes)
        return
    start = 0
    while start < len(n_genes):
        before = ends[start - 1] if start else 0
        first_gene = int(np.searchsorted(ends, before, side="right"))
        stop = max(first_gene + 1, int(np.searchsorted(ends, before + max_genes, side="right")))
        stop = min(stop, len(n_genes))  # exceeded if no later cell has a gene
        yield start, stop
        start = stop
