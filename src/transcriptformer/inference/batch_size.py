"""How large a batch may be."""

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.batches import BatchLimits
from transcriptformer.model.attention.definition import QUERY_BLOCK
from transcriptformer.model.esm2ce import Esm2CE
from transcriptformer.runtime.device import compute_dtype
from transcriptformer.runtime.memory import SHARE_OF_FREE_MEMORY, free_memory, suitable_tokens

MOST_CELLS = 4096
"""Of a batch whose size is chosen here."""


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
