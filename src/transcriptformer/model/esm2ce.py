"""ESM2-CE, the baseline without a transformer: a cell is the scaled sum of its genes' protein embeddings."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Esm2CE(nn.Module):
    """Look up protein embeddings (V, P) and sum them over the genes of a cell.

    Parameters
    ----------
    embedding
        Protein embeddings (V, P), including those of special tokens.
    pad
        Padding token.
    seq_len
        Sequence length of the transformer that this is the baseline of.
    """

    def __init__(self, embedding: Tensor, pad: int, seq_len: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding, requires_grad=False)
        self.pad, self.seq_len = pad, seq_len

    def gene_embedding(self, gene_tokens: Tensor) -> Tensor:
        """Return the protein embeddings (…, P) of gene tokens (…)."""
        return F.embedding(gene_tokens, self.embedding)

    def cell_embedding(self, gene_tokens: Tensor) -> Tensor:
        """Sum the protein embeddings of each cell's genes and divide by `seq_len`: (B, L) → (B, P)."""
        is_gene = (gene_tokens != self.pad).to(self.embedding.dtype)
        summed = F.embedding_bag(gene_tokens, self.embedding, mode="sum", per_sample_weights=is_gene)
        return summed.to(torch.float32) / self.seq_len
