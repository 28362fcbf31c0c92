"""The task of `inference`: embeddings of cells or genes, likelihoods and labels. Defines all output keys."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.config import InferenceConfig
from transcriptformer.data.metadata import n_rows
from transcriptformer.data.row_stream import RowStream
from transcriptformer.inference.module import Esm2CEModule, TranscriptFormerModule
from transcriptformer.model.esm2ce import Esm2CE
from transcriptformer.runs.output import GENE_COLUMN, PROVENANCE_KEY, open_result, read_provenance
from transcriptformer.runs.task import CellModule, Results, Task
from transcriptformer.storage.results import LABEL, LABEL_PROBABILITY, N_GENES, Field, Layout

EMBEDDINGS_KEY, LLH_KEY = "embeddings", "llh"
CGE_KEY, CGE_CELLS_KEY, CGE_GENES_KEY = "cge_embeddings", "cge_cell_indices", "cge_gene_names"

BLOCK_BYTES = 2**23
"""Approximate size of the blocks in which results are copied."""


def layout_of(inference: InferenceConfig, width: int, with_labels: bool = False) -> Layout:
    """Layout of the requested results, for embeddings of the given width; labels need cell embeddings."""
    layout: dict[str, Field] = {}
    if EMBEDDINGS_KEY in inference.output_keys and inference.emb_type == "cell":
        layout[EMBEDDINGS_KEY] = Field("float32", width)
    elif EMBEDDINGS_KEY in inference.output_keys:
        layout[N_GENES] = Field("int32")
        layout["genes"] = Field("int32", per_gene=True)
        layout[CGE_KEY] = Field("float32", width, per_gene=True)
    if LLH_KEY in inference.output_keys:
        layout[LLH_KEY] = Field("float32", of_genes=True)
    if with_labels and EMBEDDINGS_KEY in layout:
        layout |= {LABEL: Field("int32"), LABEL_PROBABILITY: Field("float32")}
    return layout


class Embeddings(Task):
    """Embeddings of cells or genes, as the configuration requests."""

    group_option, pooled_field = "--cge-pool", CGE_KEY

    def __init__(self, checkpoint: Checkpoint) -> None:
        inference = checkpoint.config.model.inference_config
        layout = layout_of(inference, checkpoint.width, checkpoint.label_head is not None)
        super().__init__(checkpoint, layout, inference.cge_pool)

    def make_module(self) -> CellModule:
        """Wrap the model of the checkpoint with what the run computes from it."""
        checkpoint, model = self.checkpoint, self.checkpoint.config.model
        if isinstance(checkpoint.model, Esm2CE):
            return Esm2CEModule(checkpoint.model, model.inference_config, checkpoint.gene_vocab.pad)
        clip_counts, label_head = model.data_config.clip_counts, checkpoint.label_head
        return TranscriptFormerModule(checkpoint.model, model.inference_config, clip_counts, label_head)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of predicted labels, if any."""
        head = self.checkpoint.label_head
        if head is None or LABEL not in self.layout:
            return []
        return [f"predicted_{head.column}", f"predicted_{head.column}_probability"]

    def values_of_columns(self, results: Results, start: int, stop: int) -> dict[str, Any]:
        """Return the predicted labels of cells `start:stop` and their probabilities."""
        head = self.checkpoint.label_head
        if head is None or LABEL not in self.layout:
            return {}
        labels = pd.Categorical.from_codes(results.read(LABEL, start, stop), pd.Index(head.labels))
        return dict(zip(self.columns, (labels, results.read(LABEL_PROBABILITY, start, stop)), strict=True))

    def add_to(self, adata: anndata.AnnData, results: Results) -> None:  # noqa: D102
        n_cells, layout = adata.n_obs, self.layout
        if EMBEDDINGS_KEY in layout:
            adata.obsm[EMBEDDINGS_KEY] = results.read(EMBEDDINGS_KEY, 0, n_cells)
        if LLH_KEY in layout:
            llh = results.read(LLH_KEY, 0, n_cells)
            adata.uns[LLH_KEY] = pd.DataFrame({LLH_KEY: llh}, index=adata.obs_names.rename(None))
        if CGE_KEY in layout:
            adata.uns[CGE_KEY] = results.read_genes(CGE_KEY, 0, n_cells)
            adata.uns[CGE_CELLS_KEY] = np.repeat(np.arange(n_cells), results.n_genes)
            adata.uns[CGE_GENES_KEY] = self.checkpoint.gene_vocab.names()[results.read_genes("genes", 0, n_cells)]

    def write(  # noqa: D102
        self,
        root: h5py.File | zarr.Group,
        n_cells: int,
        results: Results,
        obs_blocks: Callable[[], Iterator[pd.DataFrame]],
    ) -> None:
        if EMBEDDINGS_KEY in self.layout:
            stream = RowStream(root, f"obsm/{EMBEDDINGS_KEY}", n_cells)
            step = max(1, BLOCK_BYTES // self.layout[EMBEDDINGS_KEY].record_bytes)
            for start in range(0, n_cells, step):
                stream.write(results.read(EMBEDDINGS_KEY, start, min(start + step, n_cells)))
        if LLH_KEY in self.layout:
            stream, start = RowStream(root, f"uns/{LLH_KEY}", n_cells), 0
            for block in obs_blocks():
                values = results.read(LLH_KEY, start, start + len(block))
                stream.write(pd.DataFrame({LLH_KEY: values}, index=block.index.rename(None)))
                start += len(block)
        if CGE_KEY in self.layout:
            _write_gene_embeddings(root, results, self.checkpoint.gene_vocab.names())

    def pooled(self, table: pd.DataFrame, means: np.ndarray) -> anndata.AnnData:  # noqa: D102
        return anndata.AnnData(obs=table, obsm={EMBEDDINGS_KEY: means})


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


def describe(path: Path) -> str:
    """Summarize the contents of a result in one line."""
    with open_result(path) as root:
        obs, uns = root["obs"], root["uns"]
        stored = [f"obsm['{key}'] {tuple(root['obsm'][key].shape)}" for key in root["obsm"]]
        stored += [f"uns['{CGE_KEY}'] {tuple(uns[CGE_KEY].shape)}"] if CGE_KEY in uns else []
        stored += [f"uns['{LLH_KEY}']"] if LLH_KEY in uns else []
        rows = n_rows(obs[obs.attrs["_index"]])
    config = json.loads((read_provenance(path) or {}).get("config", "{}"))
    is_pooled = config and config["model"]["inference_config"]["cge_pool"] is not None
    return f"{rows} {'gene rows' if is_pooled else 'cells'}: {', '.join(stored)}"


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
