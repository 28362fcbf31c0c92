"""Compare protein embedding in length-sorted, token-limited batches with batches of 16 in file order.

`python -m scripts.protein_speed`
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tests.esm2_models import convert, random_esm2
from tests.proteins.fasta_files import random_protein

from transcriptformer.proteins.embed import MAX_LENGTH, TOKENS_PER_BATCH, plan_batches
from transcriptformer.proteins.esm2 import Esm2
from transcriptformer.proteins.fasta import Protein
from transcriptformer.proteins.isoforms import FIRST, Proteome, choose_isoforms

MEDIAN, SIGMA = 375, 0.8
"""Log-normal length distribution, similar to that of animal proteins."""


def main() -> None:
    """Alternate both batching strategies on the same proteins and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proteins", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6, help="default: as in esm2_t6_8M")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--tokens-per-batch", type=int, default=TOKENS_PER_BATCH["cpu"])
    arguments = parser.parse_args()
    proteome = random_proteome(arguments.proteins)
    fixed = [proteome.sequences[i : i + 16] for i in range(0, arguments.proteins, 16)]
    ours = [batch.sequences for batch in plan_batches(proteome, arguments.tokens_per_batch, MAX_LENGTH)]
    with tempfile.TemporaryDirectory() as folder:
        model_folder = convert(random_esm2(arguments.layers, arguments.width, arguments.heads), Path(folder) / "model")
        model = Esm2(model_folder, arguments.layers, "32", torch.device("cpu"))
    strategies = {"16 in file order": fixed, "sorted, by tokens": ours}
    for name, batches in strategies.items():
        print(f"{name:18} {len(batches)} batches, {100 * padding_share(batches):.0f} % padding")
    model.residue_means(ours[-1])
    seconds: dict[str, list[float]] = {name: [] for name in strategies}
    for _ in range(arguments.repeats):
        for name, batches in strategies.items():
            started = time.perf_counter()
            for batch in batches:
                model.residue_means(batch)
            seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        median = statistics.median(values)
        rate = arguments.proteins / median
        print(f"{name:18} {median:.2f} s ({min(values):.2f} to {max(values):.2f}), {rate:.1f} proteins/s")
    ratios = [slow / fast for slow, fast in zip(*seconds.values(), strict=True)]
    print(f"ratio over pairs: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def random_proteome(n_proteins: int) -> Proteome:
    """Random proteins with log-normal lengths."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(np.log(MEDIAN), SIGMA, n_proteins), 30).astype(int)
    proteins = [Protein(str(i), random_protein(rng, int(length))) for i, length in enumerate(lengths)]
    return choose_isoforms(proteins, FIRST, MAX_LENGTH)


def padding_share(batches: list[list[str]]) -> float:
    """Share of padding among the tokens of all batches."""
    n_all = sum(len(batch) * (max(map(len, batch)) + 2) for batch in batches)
    return 1 - sum(len(residues) + 2 for batch in batches for residues in batch) / n_all


if __name__ == "__main__":
    main()
