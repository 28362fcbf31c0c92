"""Measure loading, tokenizing and embedding, for a checkpoint and a file, on this machine.

    python scripts/benchmark.py CHECKPOINT FILE.h5ad [--precision 32] [--batch-size 8] [--cells 16] [--copies 1]

- load: seconds from the folder to a model that is ready to run, and the most memory the process held meanwhile. Run it
  twice: the first run may read the weights from disk, the second finds them in the file cache.
- tokenize: cells per second from counts in memory (CSR) to batches ready for the model, in one process and on one core;
  median of five. A file is aligned with the vocabulary once, however many cells it has; `--copies 20` repeats the cells
  of a small example until they weigh as they do in a file of the usual size.
- embed: cells per second through the model alone; median over batches, the first one apart. `--cells 0` leaves it out.
"""

import argparse
import json
import logging
import resource
import statistics
import time
from pathlib import Path

import anndata
import torch
from rich.console import Console
from rich.table import Table

from transcriptformer.checkpoint import Checkpoint, load_checkpoint
from transcriptformer.config import Config, load_config
from transcriptformer.data.dataset import Batch, CellDataset
from transcriptformer.lightning import TranscriptFormerModule

MIB = 2**20
REPEATS = 5


def main() -> None:
    """Run the measurements that were asked for and print them."""
    logging.getLogger("transcriptformer").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description="Measure loading, tokenizing and embedding on this machine.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--precision", default="16-mixed")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cells", type=int, default=16, help="cells to embed; 0: none")
    parser.add_argument("--copies", type=int, default=1, help="how often to repeat the cells before tokenizing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()

    config = load_config(
        arguments.checkpoint,
        {
            "model.inference_config.precision": arguments.precision,
            "model.inference_config.batch_size": arguments.batch_size,
        },
    )
    checkpoint, figures = measure_loading(arguments.checkpoint, config)
    figures |= measure_tokenizing(arguments.file, checkpoint, config, arguments.copies)
    if arguments.cells:
        figures |= measure_embedding(arguments.file, checkpoint, config, arguments.cells)
    show(figures, as_json=arguments.json)


def measure_loading(path: Path, config: Config) -> tuple[Checkpoint, dict[str, float]]:
    """Load the checkpoint; must come first, because memory is measured as the most the process ever held."""
    before = _peak_memory()
    started = time.perf_counter()
    checkpoint = load_checkpoint(path, config)
    return checkpoint, {
        "load_s": time.perf_counter() - started,
        "load_peak_mib": _peak_memory() / MIB,
        "load_peak_without_imports_mib": (_peak_memory() - before) / MIB,
        "weights_mib": (path / "model_weights.pt").stat().st_size / MIB,
    }


def measure_tokenizing(file: Path, checkpoint: Checkpoint, config: Config, copies: int) -> dict[str, float]:
    """From an AnnData in memory to every one of its batches."""
    once = anndata.read_h5ad(file)
    adata = anndata.concat([once] * copies, merge="same", index_unique="-") if copies > 1 else once
    rates = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        dataset = _dataset(adata, checkpoint, config)
        for batch in _rows_of_batches(len(dataset), config):
            dataset.__getitems__(batch)
        rates.append(adata.n_obs / (time.perf_counter() - started))
    return {
        "cells": adata.n_obs,
        "genes_per_cell": float(dataset.tokens.lengths.mean()),
        "tokenize_cells_per_s": statistics.median(rates),
    }


def measure_embedding(file: Path, checkpoint: Checkpoint, config: Config, n_cells: int) -> dict[str, float]:
    """Whole batches through the model, without reading and writing."""
    dataset = _dataset(anndata.read_h5ad(file)[:n_cells], checkpoint, config)
    module = TranscriptFormerModule(checkpoint.model, config).to(checkpoint.device)
    seconds_per_cell = []
    with torch.inference_mode():
        for i, rows in enumerate(_rows_of_batches(len(dataset), config)):
            batch = Batch(*(tensor.to(checkpoint.device) for tensor in dataset.__getitems__(rows)))
            started = time.perf_counter()
            embedding = module.predict_step(batch, i).embedding
            assert embedding is not None
            embedding.cpu()  # waits for the device
            seconds_per_cell.append((time.perf_counter() - started) / len(rows))
    later = seconds_per_cell[1:] or seconds_per_cell
    return {"first_batch_s_per_cell": seconds_per_cell[0], "embed_cells_per_s": 1 / statistics.median(later)}


def show(figures: dict[str, float], as_json: bool) -> None:
    """Print as JSON or as a table, with the machine."""
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": _cpu_name()}
    if as_json:
        print(json.dumps(machine | figures))
        return
    table = Table("figure", "value", title=", ".join(f"{key} {value}" for key, value in machine.items()))
    for name, value in figures.items():
        table.add_row(name, f"{value:,.3g}" if value < 100 else f"{value:,.0f}")
    Console().print(table)


def _dataset(adata: anndata.AnnData, checkpoint: Checkpoint, config: Config) -> CellDataset:
    model = config.model
    return CellDataset(
        [adata], checkpoint.gene_vocab, checkpoint.aux_vocabs, model.data_config, model.model_config.seq_len
    )


def _rows_of_batches(n_cells: int, config: Config) -> list[list[int]]:
    size = config.model.inference_config.batch_size
    return [list(range(start, min(start + size, n_cells))) for start in range(0, n_cells, size)]


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
