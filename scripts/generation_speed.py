"""Speed of drawing cells with the key-value cache and without, at the size of TF-Sapiens with random weights.

    python scripts/generation_speed.py [--cells 16] [--genes 512] [--points 3] [--threads 2]

Both times of a step are nearly linear in the number of genes so far. They are measured in turn at a few numbers, in the
middle of equal parts of the cell, and added up over all steps. A step predicts the next gene and its count; drawing
them is the same in both.
"""

import argparse
import time

import numpy as np
import torch

from transcriptformer.config import LossConfig, ModelConfig
from transcriptformer.model.cache import KeyValueCache
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.vocab import make_aux_vocab, make_gene_vocab

SPECIAL = ("unknown", "[PAD]", "[START]", "[END]", "[RD]", "[CELL]", "[MASK]")
N_GENES, PROTEIN_DIM = 23_822, 2560
CACHED_STEPS = 5


def main() -> None:
    """Print a line per point, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=16)
    parser.add_argument("--genes", type=int, default=512)
    parser.add_argument("--points", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = random_model()
    lengths = (np.arange(arguments.points) + 0.5) * arguments.genes / arguments.points
    seconds = []
    with torch.inference_mode():
        model.gene_embeddings.table = torch.randn(N_GENES + len(SPECIAL), model.config.embed_dim)
        model.gene_embeddings.is_known = torch.ones(N_GENES + len(SPECIAL), dtype=torch.bool)
        for length in lengths.astype(int):
            seconds.append((with_cache(model, arguments.cells, length), without_cache(model, arguments.cells, length)))
            print(
                f"after {length} genes: {seconds[-1][0]:.3f} s per step with the cache, {seconds[-1][1]:.1f} s without"
            )
    cached, plain = arguments.genes * np.mean(seconds, axis=0)
    print(f"{arguments.cells} cells of {arguments.genes} genes: {cached:.0f} s with the cache, {plain:.0f} s without")
    print(f"ratio {plain / cached:.0f}")


def random_model() -> TranscriptFormer:
    """Return a model of TF-Sapiens' size with random weights."""
    config = ModelConfig(
        num_layers=12, num_heads=16, embed_dim=2048, model_dim=2048, seq_len=2047, aux_len=1, gene_head_hidden_dim=2048
    )
    genes = make_gene_vocab([f"gene {i}" for i in range(N_GENES)], SPECIAL, "[PAD]")
    aux = {"assay": make_aux_vocab("assay", ["a", "b"], "unknown")}
    model = TranscriptFormer(config, LossConfig(), genes, aux, PROTEIN_DIM)
    return model.eval().requires_grad_(False)


def with_cache(model: TranscriptFormer, n_cells: int, length: int) -> float:
    """Return the seconds of a step after `length` genes, whose keys and values are random."""
    aux, gene = torch.ones(n_cells, 1, dtype=torch.int64), torch.randint(10, N_GENES, (n_cells, 1))
    cache, _ = model.begin(aux, length + CACHED_STEPS + 1)
    fill(cache, length)
    step_with_cache(model, cache, gene)
    started = time.perf_counter()
    for _ in range(CACHED_STEPS):
        step_with_cache(model, cache, gene)
    return (time.perf_counter() - started) / CACHED_STEPS


def fill(cache: KeyValueCache, length: int) -> None:
    """Fill the cache as by `length` genes."""
    cache.append_masks(*(torch.ones(len(cache.key_bias), length) for _ in range(2)))
    for layer in cache.layers:
        shape = *layer.keys.shape[:2], length, layer.keys.shape[3]
        layer.append(torch.randn(shape), torch.randn(shape))


def step_with_cache(model: TranscriptFormer, cache: KeyValueCache, gene: torch.Tensor) -> None:
    """Append a gene, and predict the next and its count."""
    predict(model, model.extend(cache, gene, torch.ones(gene.shape))[:, 0], gene[:, 0])


def without_cache(model: TranscriptFormer, n_cells: int, length: int) -> float:
    """Return the seconds of a step after `length` genes, which computes all of them again."""
    genes = torch.randint(10, N_GENES, (n_cells, length + 1))
    genes[:, -1] = SPECIAL.index("[PAD]")
    started = time.perf_counter()
    encoded = model(genes, torch.ones(genes.shape), torch.ones(n_cells, 1, dtype=torch.int64))
    predict(model, encoded.hidden[:, -1], genes[:, 0])
    return time.perf_counter() - started


def predict(model: TranscriptFormer, hidden: torch.Tensor, gene: torch.Tensor) -> None:
    """Run both heads on states (B, D)."""
    torch.log_softmax(model.gene_logits(hidden), dim=1)
    model.mu.before_link(hidden, model.gene_embeddings(gene), gene)


if __name__ == "__main__":
    main()
