"""Embedding measurements of `scripts/benchmark.py`: rates, stages, and the share of the machine's matrix rate."""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from scipy import sparse

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.survey import survey_cells
from transcriptformer.inference.embeddings import Embeddings
from transcriptformer.inference.module import TranscriptFormerModule
from transcriptformer.model.attention.choose import ATTENTION
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.batch_size import batch_limits
from transcriptformer.runs.inputs import Inputs
from transcriptformer.runs.output import to_anndata, write_anndata
from transcriptformer.runs.recording import MemoryRecorder
from transcriptformer.runtime.device import compute_dtype
from transcriptformer.runtime.memory import keep_freed_memory

MATRIX_REPEATS = 5


def measure_embedding(cells: anndata.AnnData, checkpoint: Checkpoint) -> dict[str, float]:
    """Time every stage from an AnnData in memory to an h5ad file, and derive rates.

    A warm-up pass over the first batch, which may compile, is timed separately. Stages within the model are timed on
    the last batch (`stage_one_batch_s` in total), the others on all cells.
    """
    model, device = checkpoint.model, checkpoint.device
    assert isinstance(model, TranscriptFormer), "ESM2-CE has no encoder to measure"
    if device.type == "cpu":
        keep_freed_memory()
    stages: dict[str, float] = defaultdict(float)
    with timed("read", stages):
        task = Embeddings(checkpoint)
        inputs = Inputs([cells], task)
        survey = survey_cells(inputs.readers, checkpoint.config.model.data_config)
    with timed("tokenize", stages):
        batches = list(inputs.loader(survey, batch_limits(checkpoint), 0, 1, np.zeros(survey.n_kept, bool)))
    with timed("weights to device", stages):
        module = task.make_module().to(device)
        assert isinstance(module, TranscriptFormerModule)
    inference = checkpoint.config.model.inference_config
    dtype = compute_dtype(inference.precision, device)
    module.prepare(survey.lengths, device)
    seconds, rates = [], []
    results = MemoryRecorder(task.layout, survey.n_kept)
    with torch.inference_mode():
        started = time.perf_counter()
        module(batches[0].to(device))
        synchronize(device)
        warm_up = time.perf_counter() - started
        for batch in batches:
            with timed("transfer", stages, device):
                on_device = batch.to(device)
            started = time.perf_counter()
            arrays = {name: values.cpu().numpy() for name, values in module(on_device).items()}  # waits for the device
            seconds.append(time.perf_counter() - started)
            results.add(arrays)
            rates.append(matrix_rate(model.config.embed_dim, dtype, device))
        with stage_clock(model, stages, device):
            module(batches[-1].to(device))
    with timed("output", stages), tempfile.TemporaryDirectory() as folder:
        write_anndata(to_anndata(inputs.obs(survey), task, results, {}), Path(folder) / "embeddings.h5ad")
    n_cells, genes = survey.n_kept, float(sum((batch.gene_counts > 0).sum() for batch in batches))
    positions = sum(batch.gene_tokens.numel() for batch in batches)
    total, rate = sum(seconds), statistics.median(rates)
    layers = inference.embedding_layer_index % model.config.num_layers + 1
    per_token = layers * 2 * model.config.embed_dim * (4 * model.config.embed_dim + 2 * model.config.model_dim)
    floor = genes * per_token / rate
    return {
        "attention": next(name for name, path in ATTENTION.items() if path is model.transformer_encoder.attention),  # type: ignore[dict-item]
        "cells": n_cells,
        "genes_per_cell": genes / n_cells,
        "first_batch_s": warm_up,
        "s_per_cell": total / n_cells,
        "embed_cells_per_s": n_cells / total,
        "embed_tokens_per_s": genes / total,
        "padding_share": 1 - genes / positions,
        "matrix_tflops": rate / 1e12,
        "floor_s_per_cell": floor / n_cells,
        "fraction_of_matrix_rate": floor / total,
        **{f"stage_{name.replace(' ', '_')}_s": value for name, value in stages.items()},
    }


def matrix_rate(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a matrix product of the model's width and dtype."""
    x, weight = (torch.randn(n, width, device=device).to(dtype) for n in (max(2048, width), width))
    torch.nn.functional.linear(x, weight)
    seconds = []
    for _ in range(MATRIX_REPEATS):
        synchronize(device)
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * x.shape[0] * width**2 / statistics.median(seconds)


@contextmanager
def timed(name: str, stages: dict[str, float], device: torch.device | None = None) -> Iterator[None]:
    """Add the seconds of the enclosed code to a stage."""
    started = time.perf_counter()
    yield
    synchronize(device)
    stages[name] += time.perf_counter() - started


@contextmanager
def stage_clock(model: TranscriptFormer, stages: dict[str, float], device: torch.device) -> Iterator[None]:
    """Add the seconds of the model's parts to `stages` while one batch runs, synchronizing at every step."""
    watched: dict[str, list[torch.nn.Module]] = {"gene embedding": [model.gene_embeddings]}
    for name, parts in {
        "attention, projections included": ("self_attn",),
        "feed-forward": ("linear1", "linear2"),
        "norms": ("norm1", "norm2"),
    }.items():
        blocks = model.transformer_encoder.encoder_layers
        watched[name] = [block.get_submodule(part) for block in blocks for part in parts]
    started: dict[torch.nn.Module, float] = {}

    def start(module: torch.nn.Module, _inputs: Any) -> None:
        synchronize(device)
        started[module] = time.perf_counter()

    handles = []
    for name, modules in watched.items():

        def stop(module: torch.nn.Module, _inputs: Any, _output: Any, name: str = name) -> None:
            synchronize(device)
            stages[name] += time.perf_counter() - started[module]

        for module in modules:
            handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    with timed("one batch", stages, device):
        yield
    for handle in handles:
        handle.remove()


def synchronize(device: torch.device | None) -> None:
    """Wait until the device is idle."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def truncate_genes(cells: anndata.AnnData, max_genes: int) -> anndata.AnnData:
    """Keep at most the first `max_genes` expressed genes of each cell."""
    counts = sparse.csr_array(cells.X, copy=True)
    counts.eliminate_zeros()
    rank = np.arange(counts.nnz) - np.repeat(counts.indptr[:-1], np.diff(counts.indptr))
    counts.data[rank >= max_genes] = 0
    counts.eliminate_zeros()
    return anndata.AnnData(counts, obs=cells.obs, var=cells.var)
