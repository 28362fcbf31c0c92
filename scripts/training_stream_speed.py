"""Measure the speed and mixing of the shuffled training stream.

    python scripts/benchmark.py TINY FILE --make-cells 1000000
    python scripts/training_stream_speed.py TINY FILE [--workers 2] [--batch-size 256]

Over one epoch: cells per second from the file to model-ready batches, whether every cell is seen once, blocks of
consecutive cells per step, and peak memory of the main process.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from transcriptformer.checkpoint.vocabs import read_aux_vocab, read_gene_vocab
from transcriptformer.data.batches import BatchLimits
from transcriptformer.training.config import load_train_config
from transcriptformer.training.corpus import Corpus
from transcriptformer.training.order import Blocks, Epochs
from transcriptformer.training.stream import StepLoader, TrainingDataset

MIB = 2**20


def main() -> None:
    """Run one epoch and print the figures."""
    parser = argparse.ArgumentParser(description="Measure the shuffled training stream.")
    parser.add_argument("checkpoint", type=Path, help="checkpoint that provides the vocabularies")
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = parser.parse_args()
    vocabs = arguments.checkpoint / "vocabs"
    config = load_train_config(
        {"training.data_files": [str(arguments.file)], "training.protein_embeddings": [str(vocabs / "random_gene.h5")]}
    )
    training, data = config.training, config.model.data_config
    genes = read_gene_vocab([vocabs / "random_gene.h5"], data.special_tokens, data.gene_pad_token)
    assays = read_aux_vocab(vocabs / "assay_vocab.json", "assay", data.aux_pad_token)
    corpus = Corpus(training, data, genes)
    readers, n_cells = corpus.readers(genes, {"assay": assays}, 2047), len(corpus.sources[0])
    blocks = Blocks([n_cells], np.ones(n_cells, bool), training.block_size)
    window = training.block_size * training.blocks_to_mix
    epochs = Epochs(blocks, [1.0], training.streams, window, arguments.batch_size, training.seed)
    dataset = TrainingDataset(readers, epochs, range(epochs.n_steps(0)))
    loader = StepLoader(dataset, BatchLimits(arguments.batch_size, 2**18), genes.pad, 2047, arguments.workers)
    n_visits, n_blocks = np.zeros(n_cells, np.int8), []
    started = time.perf_counter()
    for step in loader:
        rows = np.concatenate([batch.rows.numpy() for batch in step])
        n_visits[rows] += 1
        n_blocks.append(len(np.unique(rows // training.block_size)))
    seconds = time.perf_counter() - started
    print(f"{n_cells} cells, {n_cells / seconds:,.0f} cells/s; each cell seen once: {bool((n_visits == 1).all())}")
    print(f"blocks per step: median {np.median(n_blocks):.0f}, minimum {min(n_blocks)}; {len(n_blocks)} steps")
    print(f"peak memory of the main process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
