"""Measure loading, reading, tokenizing and embedding of a checkpoint and a file on this machine.

    python scripts/benchmark.py CHECKPOINT FILE [--precision 32] [--cells 16] [--copies 1] [--json]
    python scripts/benchmark.py CHECKPOINT FILE --reference PYTHON [--repeats 3] [--cells 6] [--command]
    python scripts/benchmark.py CHECKPOINT FILE --plot FILE.png [--reference PYTHON]
    python scripts/benchmark.py CHECKPOINT FILE --stream [--workers 2] [--batch-size 64]
    python scripts/benchmark.py CHECKPOINT FILE --make-cells 1000000

- load: seconds from the folder to a ready model, and peak memory of the process. Run it twice: the first run may read
  the weights from disk, the second finds them in the file cache.
- tokenize: cells per second from counts in memory (CSR) to model-ready batches, in one process on one core; median of
  five. A file is aligned with the vocabulary once; `--copies 20` repeats the cells of a small example to amortize this
  cost as a file of typical size would.
- embed: cells and tokens per second through the model, excluding the first batch; share of padding; time per stage; and
  the fraction of this machine's matrix-product rate that the linear layers would reach if nothing else took time.
  `--cells 0` skips it.
- reference: alternating runs of the published package, installed for PYTHON, and of this one, and the ratio of the
  medians; with `--command`, of whole shell commands, including start-up and loading.
- plot: seconds per cell against genes per cell, for cells truncated to fewer and fewer genes.
- stream (instead of these): cells per second of the first pass over a file and of the batches that the main process
  receives from the workers, with counts left on disk; and peak memory of the main process.
- make-cells: write a file of random cells with 20,000 genes, about 1 % expressed, and a tiny checkpoint with random
  weights for these genes.
"""

import argparse
import json
import logging
import resource
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import torch
from embedding_speed import measure_embedding
from rich.console import Console
from rich.table import Table
from scipy import sparse
from versus_reference import compare, compare_commands, plot_over_genes

from transcriptformer.checkpoint.load import Checkpoint, load_checkpoint, read_vocabs
from transcriptformer.checkpoint.published import load_config
from transcriptformer.data.batches import BatchLimits
from transcriptformer.data.survey import survey_cells
from transcriptformer.inference.embeddings import Embeddings
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.inputs import Inputs

MIB = 2**20
REPEATS = 5
N_GENES, EXPRESSED = 20_000, 0.01
GENES_PER_CELL = [60, 200, 500, 900, 1300, 1700, 2047, 3000]
GENES = [f"ENSG{i:011}" for i in range(N_GENES)]


def main() -> None:
    """Run the requested measurements and print them."""
    logging.getLogger("transcriptformer").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description="Measure loading, tokenizing and embedding on this machine.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--precision", default="16-mixed")
    parser.add_argument("--batch-size", type=int, help="default: auto, or 8 without embedding")
    parser.add_argument("--cells", type=int, default=16, help="cells to embed; 0: none")
    parser.add_argument("--only-embed", action="store_true", help="skip tokenizing")
    parser.add_argument("--attention", default="auto", help="auto, blockwise, flex, plain")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--reference", metavar="PYTHON", help="interpreter with the published package")
    parser.add_argument("--reference-script", type=Path, metavar="PY", help="script that prints s/cell as JSON")
    parser.add_argument("--reference-cells", type=int, help="cells for the reference; default: --cells")
    parser.add_argument("--no-compile", action="store_true", help="run the reference without compilation")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs with --reference")
    parser.add_argument("--command", action="store_true", help="with --reference: compare whole commands")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plot seconds per cell against genes per cell")
    parser.add_argument("--copies", type=int, default=1, help="repetitions of the cells before tokenizing")
    parser.add_argument("--stream", action="store_true", help="read the file in blocks, from disk")
    parser.add_argument("--workers", type=int, default=0, help="worker processes of --stream")
    parser.add_argument("--make-cells", type=int, metavar="N", help="write CHECKPOINT and FILE, N random cells")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if arguments.make_cells:
        make_checkpoint(arguments.checkpoint)
        make_cells(arguments.file, arguments.make_cells)
        return
    if arguments.reference and not arguments.command and arguments.reference_script is None:
        parser.error("--reference needs --reference-script")
    if arguments.plot:
        show(plot_over_genes(arguments, GENES_PER_CELL), as_json=arguments.json)
        return
    if arguments.reference:
        show(compare_commands(arguments) if arguments.command else compare(arguments), as_json=arguments.json)
        return

    config = load_config(
        arguments.checkpoint,
        {
            "model.inference_config.precision": arguments.precision,
            "model.inference_config.batch_size": arguments.batch_size or "auto",
            "model.inference_config.attention": arguments.attention,
            "model.inference_config.device": arguments.device,
            "model.data_config.n_data_workers": arguments.workers,
        },
    )
    before = _peak_memory()
    started = time.perf_counter()
    checkpoint = load_checkpoint(arguments.checkpoint, config)
    figures: dict[str, object] = {
        "load_s": time.perf_counter() - started,
        "load_peak_mib": _peak_memory() / MIB,
        "load_peak_without_imports_mib": (_peak_memory() - before) / MIB,
        "weights_mib": (arguments.checkpoint / "model_weights.pt").stat().st_size / MIB,
    }
    if arguments.stream:
        figures |= measure_streaming(arguments.file, checkpoint, arguments.batch_size or 8)
    else:
        if not arguments.only_embed:
            figures |= measure_tokenizing(arguments.file, checkpoint, arguments.batch_size or 8, arguments.copies)
        if arguments.cells:
            figures |= measure_embedding(anndata.read_h5ad(arguments.file)[: arguments.cells].copy(), checkpoint)
    figures["peak_mib"] = _peak_memory() / MIB
    if checkpoint.device.type == "cuda":
        figures["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / MIB
    show(figures, as_json=arguments.json)


def make_checkpoint(path: Path, seed: int = 0) -> None:
    """Write a tiny checkpoint with random weights, for the genes of `make_cells`."""
    (path / "vocabs").mkdir(parents=True, exist_ok=True)
    sizes = {"num_layers": 1, "num_heads": 1, "embed_dim": 16, "model_dim": 16, "seq_len": 2047, "aux_len": 1}
    sections = {
        "model_config": {**sizes, "gene_head_hidden_dim": 16},
        "data_config": {"aux_cols": "assay", "esm2_mappings": ["random_gene.h5"]},
        "loss_config": {},
    }
    (path / "config.json").write_text(json.dumps({"model": sections}))
    (path / "vocabs" / "assay_vocab.json").write_text(json.dumps({"unknown": 0, "10x 3' v3": 1, "Drop-seq": 2}))
    with h5py.File(path / "vocabs" / "random_gene.h5", "w") as file:
        file["keys"] = np.array(GENES, dtype="S")
    model = load_config(path).model
    genes, assays = read_vocabs(path, load_config(path).model)
    torch.manual_seed(seed)
    weights = TranscriptFormer(model.model_config, model.loss_config, genes, assays, protein_dim=16).state_dict()
    torch.save(weights, path / "model_weights.pt")


def make_cells(path: Path, n_cells: int, seed: int = 0) -> None:
    """Write random cells block by block, in constant memory, as an h5ad with a CSR matrix."""
    rng = np.random.default_rng(seed)
    genes = pd.DataFrame({"ensembl_id": GENES}, index=[f"g{i}" for i in range(N_GENES)])
    obs = pd.DataFrame(
        {"assay": pd.Categorical(rng.choice(["10x 3' v3", "Drop-seq"], n_cells))},
        index=[f"cell{i}" for i in range(n_cells)],
    )
    empty = sparse.csr_array((n_cells, N_GENES), dtype=np.float32)
    anndata.AnnData(empty, obs=obs, var=genes).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        matrix = file["X"]
        for name, dtype in (("data", np.float32), ("indices", np.int32)):
            del matrix[name]
            matrix.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(2**18,))
        n_entries, indptr = 0, [np.zeros(1, np.int64)]
        for start in range(0, n_cells, 10_000):
            shape = min(10_000, n_cells - start), N_GENES
            block = sparse.csr_array(sparse.random_array(shape, density=EXPRESSED, dtype=np.float32, rng=rng))
            block.sort_indices()
            n_entries += block.nnz
            for name in ("data", "indices"):
                matrix[name].resize((n_entries,))
            matrix["data"][-block.nnz :] = np.ceil(block.data * 20)
            matrix["indices"][-block.nnz :] = block.indices
            indptr.append(block.indptr[1:].astype(np.int64) + (n_entries - block.nnz))
        attributes = dict(matrix["indptr"].attrs)
        del matrix["indptr"]
        matrix["indptr"] = np.concatenate(indptr)
        matrix["indptr"].attrs.update(attributes)


def measure_streaming(file: Path, checkpoint: Checkpoint, batch_size: int) -> dict[str, float]:
    """Measure both passes over a file that stays on disk."""
    inputs = Inputs([file], Embeddings(checkpoint))
    started = time.perf_counter()
    survey = survey_cells(inputs.readers, checkpoint.config.model.data_config)
    surveyed = time.perf_counter()
    n_cells = n_tokens = 0
    none_done = np.zeros(survey.n_kept, bool)
    for batch in inputs.loader(survey, BatchLimits(batch_size, 2**62), 0, 1, none_done):
        n_cells += len(batch.rows)
        n_tokens += batch.gene_tokens.numel()
    return {
        "cells": n_cells,
        "genes_per_cell": float(survey.lengths.mean()),
        "padding_share": 1 - float(survey.lengths.clip(max=inputs.seq_len).sum()) / n_tokens,
        "survey_cells_per_s": n_cells / (surveyed - started),
        "batches_cells_per_s": n_cells / (time.perf_counter() - surveyed),
        "peak_mib": _peak_memory() / MIB,
    }


def measure_tokenizing(file: Path, checkpoint: Checkpoint, batch_size: int, copies: int) -> dict[str, float]:
    """Measure the time from an AnnData in memory to all its batches, without the first pass."""
    once = anndata.read_h5ad(file)
    adata = anndata.concat([once] * copies, merge="same", index_unique="-") if copies > 1 else once
    survey = survey_cells(Inputs([adata], Embeddings(checkpoint)).readers, checkpoint.config.model.data_config)
    rates = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        inputs = Inputs([adata], Embeddings(checkpoint))
        for _batch in inputs.loader(survey, BatchLimits(batch_size, 2**62), 0, 1, np.zeros(survey.n_kept, bool)):
            pass
        rates.append(adata.n_obs / (time.perf_counter() - started))
    return {
        "cells": adata.n_obs,
        "genes_per_cell": float(survey.lengths.mean()),
        "tokenize_cells_per_s": statistics.median(rates),
    }


def show(figures: Mapping[str, object], as_json: bool) -> None:
    """Print figures and machine as JSON or a table."""
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": _cpu_name()}
    if as_json:
        print(json.dumps({**machine, **figures}))
        return
    table = Table("figure", "value", title=", ".join(f"{key} {value}" for key, value in machine.items()))
    for name, value in figures.items():
        text = str(value) if not isinstance(value, float) else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
        table.add_row(name, text)
    Console().print(table)


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
