"""How near generated counts come to observed ones after 0, 1, 2 … `--count-rounds`, on the demo's held-out cells.

The genes of each cell, in a random order, and its total count are given (teacher-forced). Counts are drawn, and
each depends on the drawn counts of the genes before it, as in `transcriptformer generate`.

    python scripts/count_rounds.py [--seeds 10] [--max-rounds 3]
"""

import argparse
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from transcriptformer.checkpoint.load import Checkpoint, load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.demo.cells import HELD_OUT, load_cells
from transcriptformer.demo.run import CHECKPOINT
from transcriptformer.generation.prompts import Prompt, require_gene_head
from transcriptformer.generation.real_cells import Cells, opened_cells
from transcriptformer.generation.sample import NewCells, Sampler, Sampling

NO_GENES = Prompt(np.zeros(0, np.int64), np.zeros(0, np.float32))


class CountSampler(Sampler):
    """Draws the counts of given genes (B, L)."""

    given: Tensor
    step = 0

    def _draw_genes(
        self, hidden: Tensor, allowed: Tensor, streams: Sequence[np.random.Generator]
    ) -> tuple[Tensor, Tensor]:
        self.step += 1
        return self.given[:, self.step - 1], hidden.new_zeros(len(hidden))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--max-rounds", type=int, default=3)
    arguments = parser.parse_args()
    checkpoint, cells = load_demo()
    tables = [measure(checkpoint, cells, r, arguments.seeds) for r in range(arguments.max_rounds + 1)]
    table = pd.concat(tables, keys=range(len(tables)), names=["count_rounds"])  # (rounds × cells, measures)
    by_rounds = table.groupby("count_rounds")
    print(f"{len(cells.names)} held-out cells, {cells.tokens.lengths.mean():.0f} genes each, {arguments.seeds} seeds")
    print(by_rounds.mean().round(4).to_string())
    print("difference from 0 rounds, in the same cells: mean and standard error")
    for number, values in enumerate(tables[1:], start=1):
        difference = values - tables[0]
        described = difference.agg(["mean", "sem"]).round(4).T.astype(str).agg(" ± ".join, axis=1)
        print(f"{number}: " + ", ".join(f"{name} {value}" for name, value in described.items()))


def load_demo() -> tuple[Checkpoint, Cells]:
    """Load the demo's checkpoint and its held-out cells, genes shuffled."""
    options = {"model.inference_config.device": "cpu", "model.inference_config.precision": "32"}
    checkpoint = load_checkpoint(CHECKPOINT, load_config(CHECKPOINT, options))
    cells = load_cells()
    max_genes = require_gene_head(checkpoint).max_genes
    with opened_cells(cells[cells.obs[HELD_OUT]].copy(), checkpoint, 0, max_genes) as real:
        return checkpoint, next(real.blocks())


def measure(checkpoint: Checkpoint, cells: Cells, count_rounds: int, n_seeds: int) -> pd.DataFrame:
    """Compare drawn and observed counts of each cell (cells, measures)."""
    n, lengths, totals = len(cells.names), cells.tokens.lengths, cells.tokens.totals()
    genes = np.full((n, lengths.max()), checkpoint.gene_vocab.pad)
    observed = np.zeros(genes.shape)
    is_gene = np.arange(genes.shape[1]) < lengths[:, None]
    genes[is_gene], observed[is_gene] = cells.tokens.genes, cells.tokens.counts
    drawn = np.zeros((n_seeds, *genes.shape))
    for seed in range(n_seeds):
        sampling = Sampling(count_rounds=count_rounds, seed=seed)
        mask, clip = np.ones(len(checkpoint.gene_vocab), bool), checkpoint.config.model.data_config.clip_counts
        sampler = CountSampler(require_gene_head(checkpoint), sampling, mask, clip)
        sampler.given = torch.from_numpy(genes)
        plan = NewCells(np.arange(n), [NO_GENES] * n, cells.aux_tokens, lengths.astype(np.int64), totals)
        drawn[seed] = sampler(plan).counts.numpy()
    mean = drawn.mean(0)
    rows = []
    for i, length in enumerate(lengths):
        own, seen = drawn[:, i, :length], observed[i, :length]
        rows.append(
            {
                "error of a draw": np.abs(own - seen).mean(),
                "error of the mean": np.abs(mean[i, :length] - seen).mean(),
                "log error of the mean": np.abs(np.log1p(mean[i, :length]) - np.log1p(seen)).mean(),
                "Spearman of the mean": stats.spearmanr(mean[i, :length], seen).statistic,
                "total / wanted": own.sum(1).mean() / totals[i],
                "share of ones - observed": (own == 1).mean() - (seen == 1).mean(),
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
