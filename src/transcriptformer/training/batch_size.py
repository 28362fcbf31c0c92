"""How much of a training step is computed at a time."""

import torch

from transcriptformer.config import ModelConfig
from transcriptformer.data.batches import BatchLimits
from transcriptformer.model.attention.definition import QUERY_BLOCK
from transcriptformer.runtime.memory import SHARE_OF_FREE_MEMORY, free_memory, suitable_tokens
from transcriptformer.training.config import TrainConfig


def training_limits(
    config: TrainConfig, device: torch.device, protein_dim: int, n_learned: int, n_weights: int, n_processes: int = 1
) -> BatchLimits:
    """From `tokens_per_batch` of a training run, or the memory that is free now.

    Parameters
    ----------
    protein_dim
        Width of the protein embeddings.
    n_learned, n_weights
        Weights that are learned, each of which has a gradient and two averages of AdamW, and all weights.
    n_processes
        Processes that share this machine's memory.
    """
    training, model = config.training, config.model.model_config
    if training.tokens_per_batch is not None:
        return BatchLimits(training.batch_size, training.tokens_per_batch)
    # On a CPU the weights are in memory already.
    expected = 4 * (3 * n_learned + (n_weights if device.type != "cpu" else 0))
    room = SHARE_OF_FREE_MEMORY * (free_memory(device, n_processes) - expected)
    fitting = max(1, int(room / bytes_per_trained_token(model, protein_dim)))
    return BatchLimits(training.batch_size, min(fitting, suitable_tokens(device, model.embed_dim)))


def bytes_per_trained_token(model: ModelConfig, protein_dim: int) -> int:
    """Memory that a position takes at most while gradients are computed, in float32.

    Every block of the encoder keeps what its steps took in: states, projections, the feed-forward's two widths. The
    heads, the genes' MLP and the scores of one block of queries are there once.
    """
    block = 4 * (14 * model.embed_dim + 4 * model.model_dim)
    once = 4 * (protein_dim + 12 * model.embed_dim + 4 * model.gene_head_hidden_dim)
    return model.num_layers * block + once + 4 * 4 * model.num_heads * QUERY_BLOCK
