"""Limits on the batch size."""

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.batches import BatchLimits
from transcriptformer.model.attention.blockwise import QUERY_BLOCK
from transcriptformer.model.esm2ce import Esm2CE
from transcriptformer.runtime.device import compute_dtype
from transcriptformer.runtime.memory import SHARE_OF_FREE_MEMORY, free_memory, preferred_batch_tokens

MAX_CELLS = 4096
"""Limit on cells per batch if `batch_size` is `auto`."""


def batch_limits(checkpoint: Checkpoint, n_processes: int = 1) -> BatchLimits:
    """Derive batch limits from `batch_size` and `tokens_per_batch`; `auto` uses the currently free memory.

    Parameters
    ----------
    n_processes
        Number of processes that share this machine's memory.
    """
    inference = checkpoint.config.model.inference_config
    max_tokens = inference.tokens_per_batch or preferred_batch_tokens(checkpoint.device, checkpoint.width)
    if isinstance(inference.batch_size, int):
        return BatchLimits(inference.batch_size, max_tokens)
    available = SHARE_OF_FREE_MEMORY * (free_memory(checkpoint.device, n_processes) - checkpoint.weights_bytes)
    fitting = max(1, int(available / bytes_per_token(checkpoint)))
    return BatchLimits(MAX_CELLS, min(fitting, max_tokens))


def bytes_per_token(checkpoint: Checkpoint) -> int:
    """Estimate the peak memory of the forward pass per batch position.

    It covers a block at its widest point (float32 states; projections and feed-forward in the compute dtype), the
    scores of one query block, and the protein embedding with its projection, as if no two positions shared a gene.
    """
    if isinstance(checkpoint.model, Esm2CE):
        return 2 * 4 * checkpoint.width
    config, inference = checkpoint.config.model.model_config, checkpoint.config.model.inference_config
    size = compute_dtype(inference.precision, checkpoint.device).itemsize
    protein_dim = checkpoint.model.gene_embeddings.embedding.embedding_dim
    states = 6 * 4 * config.embed_dim
    products = size * (7 * config.embed_dim + 2 * config.model_dim)
    queries = config.seq_len if inference.attention == "plain" else QUERY_BLOCK
    scores = config.num_heads * queries * 3 * 4  # at most three float32 copies, at any precision
    gene = (4 + size) * protein_dim + (4 + size) * config.embed_dim
    heads = 4 * 4 * config.embed_dim if "llh" in inference.output_keys else 0
    return states + products + scores + gene + heads
