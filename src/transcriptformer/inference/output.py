"""Results become an AnnData, in memory, in an h5ad file or in a zarr store. The only place that names their keys."""

import asyncio
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
from transcriptformer.data.row_stream import RowStream, strings_as_they_are
from transcriptformer.data.store import Location
from transcriptformer.errors import DataError
from transcriptformer.model.label_head import LabelHead
from transcriptformer.storage.atomic import atomic_folder, atomic_write
from transcriptformer.storage.hdf5 import new_hdf5
from transcriptformer.storage.results import LABEL, LABEL_PROBABILITY, Layout

EMBEDDINGS_KEY, LLH_KEY, PROVENANCE_KEY = "embeddings", "llh", "transcriptformer"
CGE_KEY, CGE_CELLS_KEY, CGE_GENES_KEY = "cge_embeddings", "cge_cell_indices", "cge_gene_names"
GENE_COLUMN, N_CELLS_COLUMN = "gene", "n_cells"

BLOCK_BYTES = 2**23
"""Results are moved in blocks of about this size."""


class Results(Protocol):
    """Results of all kept cells, in their order.

    Attributes
    ----------
    layout
        The results there are.
    """

    layout: Layout

    @property
    def n_genes(self) -> np.ndarray:
        """Genes of each cell with a record of their own (cells,)."""
        ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """What each cell from `start` to before `stop` has once."""
        ...

    def read_genes(self, name: str, start: int, stop: int) -> np.ndarray:
        """What each gene of those cells has, cell after cell."""
        ...


def select_columns(columns: Sequence[str], obs_keys: Sequence[str]) -> list[str]:
    """The columns of cell metadata that go into the output, in the order of the file; `all` stands for every one.

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
    """Results beside the cells' metadata, in memory.

    Parameters
    ----------
    gene_names
        Name of each gene token (tokens,).
    label_head
        What has told labels, if any.
    """
    n_cells, layout = len(obs), results.layout
    obs = obs.assign(**predicted_labels(results, 0, n_cells, label_head))
    with anndata.settings.override(check_uniqueness=False):  # the survey has told of names that occur twice
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
    """Write results beside the cells' metadata, block by block; memory does not grow with the number of cells.

    Parameters
    ----------
    obs_blocks
        Called for the metadata of the cells, in order, in blocks.
    gene_names
        Name of each gene token (tokens,).
    label_head
        What has told labels, if any.

    Raises
    ------
    OutputError
        If the disk is full or the folder cannot be written to; nothing is left under `path` then.
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
    """Columns of `obs` for the cells from `start` to before `stop`: the likeliest label, and how likely it is."""
    if label_head is None or LABEL not in results.layout:
        return {}
    values = (
        pd.Categorical.from_codes(results.read(LABEL, start, stop), pd.Index(label_head.labels)),
        results.read(LABEL_PROBABILITY, start, stop),
    )
    return dict(zip(label_columns(results.layout, label_head), values, strict=True))


def label_columns(layout: Layout, label_head: LabelHead | None) -> list[str]:
    """Names of the columns of predicted labels, if there are any."""
    if label_head is None or LABEL not in layout:
        return []
    column = f"predicted_{label_head.column}"
    return [column, f"{column}_probability"]


def _write_gene_embeddings(root: h5py.File | zarr.Group, results: Results, gene_names: np.ndarray) -> None:
    n_genes = results.n_genes
    embeddings, cells, genes = (
        RowStream(root, f"uns/{key}", int(n_genes.sum())) for key in (CGE_KEY, CGE_CELLS_KEY, CGE_GENES_KEY)
    )
    most = max(1, BLOCK_BYTES // results.layout["cge_embeddings"].record_bytes)
    for start, stop in _blocks_of_genes(n_genes, most):
        embeddings.write(results.read_genes("cge_embeddings", start, stop))
        cells.write(np.repeat(np.arange(start, stop), n_genes[start:stop]))
        genes.write(gene_names[results.read_genes("genes", start, stop)])


def pooled_to_anndata(table: pd.DataFrame, means: np.ndarray, provenance: Mapping[str, object]) -> anndata.AnnData:
    """Pooled contextual gene embeddings: a row per gene, or per gene and group, with the number of cells behind it."""
    return anndata.AnnData(obs=table, obsm={EMBEDDINGS_KEY: means}, uns={PROVENANCE_KEY: dict(provenance)})


def to_rows_of_genes(result: anndata.AnnData) -> anndata.AnnData:
    """Contextual gene embeddings of `to_anndata` as an AnnData with a row for every gene of every cell."""
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
    """Write a result that is in memory."""
    with new_anndata(path) as root:
        anndata.io.write_elem(root, "/", adata)


def describe(path: Path) -> str:
    """What is stored in a result, in a few words."""
    with _open_result(path) as root:
        obs, uns = root["obs"], root["uns"]
        stored = [f"obsm['{key}'] {tuple(root['obsm'][key].shape)}" for key in root["obsm"]]
        stored += [f"uns['{CGE_KEY}'] {tuple(uns[CGE_KEY].shape)}"] if CGE_KEY in uns else []
        stored += [f"uns['{LLH_KEY}']"] if LLH_KEY in uns else []
        rows = n_rows(obs[obs.attrs["_index"]])
    config = json.loads((read_provenance(path) or {}).get("config", "{}"))
    is_pooled = config and config["model"]["inference_config"]["cge_pool"] is not None
    return f"{rows} {'rows of genes' if is_pooled else 'cells'}: {', '.join(stored)}"


def provenance_of(
    sources: Sequence[Location | anndata.AnnData],
    checkpoint: Checkpoint,
    weights_sha256: str,
    identity: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """How a result was made; `identity` is what a later run would be compared with."""
    names = ["AnnData" if isinstance(source, anndata.AnnData) else str(source) for source in sources]
    return {
        "version": version("transcriptformer"),
        "checkpoint": checkpoint.path.resolve().name,
        "weights_sha256": weights_sha256,
        "config": checkpoint.config.to_json(),
        # A path may hold bytes that are not text, which HDF5 cannot store.
        "data_files": [name.encode(errors="replace").decode() for name in names],
        **({} if identity is None else {"run": json.dumps(identity)}),
    }


def read_provenance(path: Path) -> dict[str, Any] | None:
    """How a result was made; None where `path` is no result of ours."""
    try:
        with _open_result(path) as root:
            provenance = anndata.io.read_elem(root[f"uns/{PROVENANCE_KEY}"])
    except Exception:  # whatever a file of another kind leads h5py, zarr and anndata to
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
    """An empty AnnData, to be filled; otherwise as `new_file`."""
    with strings_as_they_are(), new_file(path) as root:
        anndata.io.write_elem(root, "/", anndata.AnnData(obs=pd.DataFrame(index=pd.Index([], dtype=str))))
        yield root
        if isinstance(root, zarr.Group):
            zarr.consolidate_metadata(root.store)


@contextmanager
def new_file(path: Path) -> Iterator[h5py.File | zarr.Group]:
    """An HDF5 file, or zarr store, under a temporary name; moved into place when whole, removed on failure.

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
    """Wait until zarr writes nothing more: after one write has failed, it leaves others on their way."""

    async def others() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)

    sync(others())


def _blocks_of_genes(n_genes: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Consecutive cells that have about `most` genes together, and at least one."""
    ends = np.cumsum(n_genes, dtype=np.int64)
    if ends[-1] == 0:
        yield 0, len(n_genes)
        return
    start = 0
    while start < len(n_genes):
        before = ends[start - 1] if start else 0
        first_gene = int(np.searchsorted(ends, before, side="right"))
        stop = max(first_gene + 1, int(np.searchsorted(ends, before + most, side="right")))
        stop = min(stop, len(n_genes))  # beyond which it is where no cell that follows has a gene
        yield start, stop
        start = stop
