"""How large a batch may be."""

import torch

from transcriptformer.checkpoint import Checkpoint
from transcriptformer.config import ModelConfig
from transcriptformer.data.dataset import BatchLimits
from transcriptformer.device import compute_dtype, free_memory
from transcriptformer.model.attention import QUERY_BLOCK
from transcriptformer.model.esm2ce import Esm2CE
from transcriptformer.train_config import TrainConfig

MOST_CELLS = 4096
"""Of a batch whose size is chosen here."""

MOST_TOKENS = {"cpu": 2**15, "mps": 2**17, "cuda": 2**18}
"""The same for tokens, by device: more do not make it faster."""

CACHED_BYTES = 2**25
"""States of a batch, in float32, that a CPU has at hand: larger batches make it slower."""

SHARE_OF_FREE_MEMORY = 0.5


def batch_limits(checkpoint: Checkpoint, n_processes: int = 1) -> BatchLimits:
    """From `batch_size` and `tokens_per_batch`; `auto` looks at the memory that is free now.

    Parameters
    ----------
    n_processes
        Processes that share this machine's memory.
    """
    inference = checkpoint.config.model.inference_config
    most_tokens = inference.tokens_per_batch or suitable_tokens(checkpoint.device, checkpoint.width)
    if isinstance(inference.batch_size, int):
        return BatchLimits(inference.batch_size, most_tokens)
    room = SHARE_OF_FREE_MEMORY * (free_memory(checkpoint.device, n_processes) - checkpoint.weights_bytes)
    fitting = max(1, int(room / bytes_per_token(checkpoint)))
    return BatchLimits(MOST_CELLS, min(fitting, most_tokens))


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


def suitable_tokens(device: torch.device, width: int) -> int:
    """How many tokens of a model of that width a device likes best."""
    most = MOST_TOKENS[device.type]
    return min(most, max(1, CACHED_BYTES // (4 * width))) if device.type == "cpu" else most


def bytes_per_token(checkpoint: Checkpoint) -> int:
    """Memory that a position of a batch takes at most, on the way through the model.

    Counted are what a block holds at its widest point (states in float32, projections and feed-forward in the type of
    the matrix products), the scores of one block of queries, and the protein embedding with its projection, as if every
    position had a gene of its own.
    """
    if isinstance(checkpoint.model, Esm2CE):
        return 2 * 4 * checkpoint.width
    config, inference = checkpoint.config.model.model_config, checkpoint.config.model.inference_config
    size = compute_dtype(inference.precision, checkpoint.device).itemsize
    protein_dim = checkpoint.model.gene_embeddings.embedding.embedding_dim
    states = 6 * 4 * config.embed_dim
    products = size * (7 * config.embed_dim + 2 * config.model_dim)
    queries = config.seq_len if inference.attention == "plain" else QUERY_BLOCK
    scores = config.num_heads * queries * 3 * 4  # three times float32 at most, whatever the precision
    gene = (4 + size) * protein_dim + (4 + size) * config.embed_dim
    heads = 4 * 4 * config.embed_dim if "llh" in inference.output_keys else 0
    return states + products + scores + gene + heads
