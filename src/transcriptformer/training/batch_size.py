"""Batch size limits of training, which split a step into batches that fit into memory."""

import torch

from transcriptformer.config import ModelConfig
from transcriptformer.data.batches import BatchLimits
from transcriptformer.model.attention.blockwise import QUERY_BLOCK
from transcriptformer.runtime.memory import SHARE_OF_FREE_MEMORY, free_memory, preferred_batch_tokens
from transcriptformer.training.config import TrainConfig


def training_limits(
    config: TrainConfig, device: torch.device, protein_dim: int, n_trainable: int, n_weights: int, n_processes: int = 1
) -> BatchLimits:
    """Return the limits of a batch, from `tokens_per_batch` or the free memory.

    Parameters
    ----------
    protein_dim
        Width of the protein embeddings.
    n_trainable, n_weights
        Number of trainable weights, each with a gradient and two AdamW moments, and of all weights.
    n_processes
        Processes that share the memory of this machine.
    """
    training, model = config.training, config.model.model_config
    if training.tokens_per_batch is not None:
        return BatchLimits(training.batch_size, training.tokens_per_batch)
    # On a CPU the weights are already in memory.
    reserved = 4 * (3 * n_trainable + (n_weights if device.type != "cpu" else 0))
    available = SHARE_OF_FREE_MEMORY * (free_memory(device, n_processes) - reserved)
    fitting = max(1, int(available / bytes_per_trained_token(model, protein_dim)))
    return BatchLimits(training.batch_size, min(fitting, preferred_batch_tokens(device, model.embed_dim)))


def bytes_per_trained_token(model: ModelConfig, protein_dim: int) -> int:
    """Estimate the peak memory of a position in the backward pass, in float32.

    Every encoder layer keeps its activations: states, projections and both widths of the feed-forward. The heads, the
    gene MLP and the attention scores of one query block are counted once.
    """
    block = 4 * (14 * model.embed_dim + 4 * model.model_dim)
    once = 4 * (protein_dim + 12 * model.embed_dim + 4 * model.gene_head_hidden_dim)
    return model.num_layers * block + once + 4 * 4 * model.num_heads * QUERY_BLOCK
