"""Comparison with the published package, in alternating runs, for `scripts/benchmark.py`."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
from embedding_speed import truncate_genes

REFERENCE_STEP = 7
"""The slow reference is measured only at every seventh point: the first and the last."""

REFERENCE_PRECISION = {"16-mixed": "bf16", "bf16-mixed": "bf16", "32": "32"}


def compare(arguments: argparse.Namespace) -> dict[str, object]:
    """Alternate runs; return medians with ranges, and the ratio of the medians."""
    ours: list[dict[str, float]] = []
    reference: list[dict[str, float]] = []
    for _ in range(arguments.repeats):
        reference.append(reference_once(arguments, arguments.file))
        ours.append(ours_once(arguments, arguments.file))
        print(json.dumps({"reference": reference[-1], "ours": ours[-1]}), file=sys.stderr)
    figures: dict[str, object] = {"genes_per_cell": ours[0]["genes_per_cell"]}
    for name, runs in (("reference", reference), ("ours", ours)):
        for key in ("s_per_cell", "first_batch_s"):
            values = [run[key] for run in runs]
            figures |= {f"{name}_{key}": statistics.median(values), f"{name}_{key}_range": spread(values)}
    for key in ("floor_s_per_cell", "fraction_of_matrix_rate", "matrix_tflops", "padding_share"):
        figures[key] = statistics.median(run[key] for run in ours)
    figures["ratio"] = figures["reference_s_per_cell"] / figures["ours_s_per_cell"]  # type: ignore[operator]
    return figures


def compare_commands(arguments: argparse.Namespace) -> dict[str, object]:
    """Alternate whole commands, from the shell to the result, on the first cells of the file."""
    seconds: dict[str, list[float]] = {"reference": [], "ours": []}
    commands = {
        "reference": [str(Path(arguments.reference).with_name("transcriptformer")), "inference"],
        "ours": [str(Path(sys.executable).with_name("transcriptformer")), "inference"],
    }
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "cells.h5ad"
        anndata.read_h5ad(arguments.file)[: arguments.cells].copy().write_h5ad(data)
        options = ["--checkpoint-path", str(arguments.checkpoint.resolve()), "--data-file", str(data)]
        for i in range(arguments.repeats):
            for name, command in commands.items():
                started = time.perf_counter()
                output = ["--output-path", f"{folder}/{name}{i}"]
                done = subprocess.run(
                    [*command, *options, *output], capture_output=True, text=True, cwd=folder, check=False
                )
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                seconds[name].append(time.perf_counter() - started)
                print(name, seconds[name][-1], file=sys.stderr)
    figures: dict[str, object] = {"cells": arguments.cells}
    for name, values in seconds.items():
        figures |= {f"{name}_command_s": statistics.median(values), f"{name}_command_s_range": spread(values)}
    figures["ratio"] = statistics.median(seconds["reference"]) / statistics.median(seconds["ours"])
    return figures


def plot_over_genes(arguments: argparse.Namespace, genes_per_cell: list[int]) -> dict[str, object]:
    """Plot seconds per cell against genes per cell as a PNG, for both packages if a reference is given."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = {"this package": ours_once} | ({"published package 0.6.1": reference_once} if arguments.reference else {})
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    cells = anndata.read_h5ad(arguments.file)[: arguments.cells].copy()
    with tempfile.TemporaryDirectory() as folder:
        for i, n_genes in enumerate(genes_per_cell):
            data = Path(folder) / f"{n_genes}.h5ad"
            truncate_genes(cells, n_genes).write_h5ad(data)
            for name, run_once in runs.items():
                if run_once is reference_once and i % REFERENCE_STEP:
                    continue
                figures = run_once(arguments, data)
                points[name].append((figures["genes_per_cell"], figures["s_per_cell"]))
                print(name, points[name][-1], file=sys.stderr)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, values), marker in zip(points.items(), "os", strict=False):
        axes.plot(*zip(*values, strict=True), marker=marker, label=name)
    axes.set(xlabel="genes per cell that the model sees", ylabel="seconds per cell", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.plot, dpi=150)
    return {f"{name}, {genes:.0f} genes": seconds for name, values in points.items() for genes, seconds in values}


def ours_once(arguments: argparse.Namespace, data: Path) -> dict[str, float]:
    """Run this package once, in a subprocess."""
    command = [sys.executable, str(Path(__file__).with_name("benchmark.py")), str(arguments.checkpoint), str(data)]
    command += ["--json", "--cells", str(arguments.cells), "--precision", arguments.precision, "--only-embed"]
    command += ["--attention", arguments.attention, "--device", arguments.device]
    if arguments.batch_size:
        command += ["--batch-size", str(arguments.batch_size)]
    return last_json(command)


def reference_once(arguments: argparse.Namespace, data: Path) -> dict[str, float]:
    """Run the published package once, with its interpreter."""
    precision = "fp16" if arguments.device == "cuda" else REFERENCE_PRECISION[arguments.precision]
    device = "cuda" if arguments.device == "cuda" else "cpu"
    command = [arguments.reference, str(arguments.reference_script), str(arguments.checkpoint), str(data)]
    command += ["--cells", str(arguments.reference_cells or arguments.cells), "--precision", precision]
    command += ["--device", device, *(["--no-compile"] if arguments.no_compile else [])]
    return last_json(command)


def last_json(command: list[str]) -> dict[str, float]:
    """Parse the last line that a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values: list[float]) -> str:
    """Format the range as minimum to maximum."""
    return f"{min(values):.3g} to {max(values):.3g}"
