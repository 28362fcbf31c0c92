"""ESM2-CE, the baseline without a transformer: the protein embeddings of a cell's genes as they are."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Esm2CE(nn.Module):
    """Looks genes up among the protein embeddings (V, P).

    Parameters
    ----------
    embedding
        The protein embeddings, special tokens included (V, P).
    pad
        Token after a cell's last gene.
    seq_len
        Gene positions of the transformer beside which it is compared, L.
    """

    def __init__(self, embedding: Tensor, pad: int, seq_len: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding, requires_grad=False)
        self.pad, self.seq_len = pad, seq_len

    def gene_embedding(self, gene_tokens: Tensor) -> Tensor:
        """Protein embeddings (…, P) of gene tokens (…)."""
        return F.embedding(gene_tokens, self.embedding)

    def cell_embedding(self, gene_tokens: Tensor) -> Tensor:
        """Sum over each cell's genes, divided by `seq_len`: (B, L) → (B, P)."""
        is_gene = (gene_tokens != self.pad).to(self.embedding.dtype)
        summed = F.embedding_bag(gene_tokens, self.embedding, mode="sum", per_sample_weights=is_gene)
        return summed.to(torch.float32) / self.seq_len
