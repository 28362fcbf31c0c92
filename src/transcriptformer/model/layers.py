"""Layers of the model, from linear layers to the encoder and the count head.

Attributes are named as in the published weights (`transformer_encoder.encoder_layers.0.…`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transcriptformer.config import ModelConfig
from transcriptformer.model.attention.blockwise import blockwise_attention
from transcriptformer.model.attention.definition import Attention, ScoreMod
from transcriptformer.model.cache import KeyValueCache, LayerCache

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}

ELEMENTWISE_LINK: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "linear": lambda u: u,
}


GENE_CHUNK = 4096
"""Genes per pass of the gene MLP when a table of all genes is filled."""


class Linear(nn.Linear):
    """Linear layer that casts its input to the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32, for input of any dtype."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return super().forward(x.float())


class MLP(nn.Module):
    """Linear, ReLU, LayerNorm, dropout, linear; returns float32."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Linear(in_dim, hidden_dim),
            nn.ReLU(),
            LayerNorm(hidden_dim),
            nn.Dropout(dropout),
            Linear(hidden_dim, out_dim),
        )

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last linear layer (out_dim, hidden_dim)."""
        return self.layers[-1].weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis: (…, in_dim) → (…, out_dim)."""
        return self.layers(x).float()


class GeneEmbedding(nn.Module):
    """Frozen protein embeddings (V, P), projected to the model's width D by an MLP."""

    def __init__(self, n_genes: int, protein_dim: int, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_genes, protein_dim)
        self.embedding.weight.requires_grad_(False)
        self.mlp = MLP(protein_dim, embed_dim, embed_dim, dropout)
        self.table: Tensor | None = None  # (V, D), created with `is_known` (V,) by keep_embeddings

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed gene tokens (…) as (…, D); the MLP runs once per distinct gene."""
        if self.table is None:
            distinct, place = torch.unique(tokens, return_inverse=True)
            return F.embedding(place, self.mlp(self.embedding(distinct)))
        if self.table.device.type == "cpu":  # on a GPU the table is complete, and this query would synchronize
            self._tabulate(torch.unique(tokens[~self.is_known[tokens]]))
        return F.embedding(tokens, self.table)

    def keep_embeddings(self) -> None:
        """Cache the output of the MLP per gene; its weights must not change afterwards.

        On a GPU the cache is filled now, on a CPU at the first occurrence of each gene.
        """
        protein = self.embedding.weight
        if self.table is not None and self.table.device == protein.device:
            return
        like = self.mlp.last_weight  # the table has the dtype in which the MLP's output is rounded, so it is exact
        self.table = like.new_empty(len(protein), len(like), device=protein.device)
        self.is_known = torch.zeros(len(protein), dtype=torch.bool, device=protein.device)
        if protein.device.type != "cpu":
            self._tabulate(torch.arange(len(protein), device=protein.device))

    @torch.inference_mode()
    def _tabulate(self, genes: Tensor) -> None:
        assert self.table is not None
        for chunk in torch.split(genes, GENE_CHUNK):
            self.table[chunk] = self.mlp(self.embedding(chunk)).to(self.table.dtype)
        self.is_known[genes] = True


class SelfAttention(nn.Module):
    """Multi-head attention; `linears` are the projections to queries, keys, values and output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.linears = nn.ModuleList(Linear(dim, dim, bias=config.attn_bias) for _ in range(4))

    def forward(self, x: Tensor, mod: ScoreMod, attention: Attention, cache: LayerCache | None = None) -> Tensor:
        """Attend from every position to itself and earlier ones, those in the cache first: (B, T, D) → (B, T, D)."""
        to_q, to_k, to_v, to_out = self.linears
        x = x.to(to_q.weight.dtype)  # type: ignore[arg-type]  # one cast for three projections
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, T, D) → (B, H, T, d)
            for project in (to_q, to_k, to_v)
        )
        if cache is not None:
            k, v = cache.append(k, v)
        values = attention(q, k, v, mod)
        return to_out(values.transpose(1, 2).flatten(2))  # (B, H, T, d) → (B, T, D)


class Block(nn.Module):
    """Transformer block whose residual connections start from the normalized states, not from the block's input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, hidden = config.embed_dim, config.model_dim
        self.self_attn = SelfAttention(config)
        self.linear1 = Linear(dim, hidden, bias=config.fw_bias)
        self.linear2 = Linear(hidden, dim, bias=config.fw_bias)
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = ACTIVATION[config.activation]

    def forward(self, x: Tensor, mod: ScoreMod, attention: Attention, cache: LayerCache | None = None) -> Tensor:
        """Apply attention and feed-forward: (B, T, D) → (B, T, D), float32."""
        x = self.norm1(x)
        x = x + self.self_attn(x, mod, attention, cache)
        x = self.norm2(x)
        return x + self.linear2(self.dropout(self.activation(self.linear1(x))))


class Encoder(nn.Module):
    """Stack of blocks, without a final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder_layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.attention: Attention = blockwise_attention

    def forward(self, x: Tensor, mod: ScoreMod, layer: int) -> Tensor:
        """Return the states (B, T, D) after block `layer`, counted from 0, or from the end if negative."""
        for block in self.encoder_layers[: layer % len(self.encoder_layers) + 1]:
            x = block(x, mod, self.attention)
        return x

    def extend(self, x: Tensor, mod: ScoreMod, cache: KeyValueCache) -> Tensor:
        """Append positions (B, n, D) to those in the cache and return their states; `mod` is that of all positions."""
        for block, layer in zip(self.encoder_layers, cache.layers, strict=True):
            x = block(x, mod, blockwise_attention, layer)
        return x


class CountHead(nn.Module):
    """Predict the expected count of a gene from the state before it and the gene itself."""

    def __init__(self, n_genes: int, embed_dim: int, dropout: float, link: str) -> None:
        super().__init__()
        self.gene_embedding = nn.Embedding(n_genes, 1)  # per-gene bias
        self.mlp = MLP(2 * embed_dim, embed_dim // 2, 1, dropout)
        self.link = link

    def forward(
        self, hidden: Tensor, gene_embedding: Tensor, gene_tokens: Tensor, counts: Tensor, is_gene: Tensor
    ) -> Tensor:
        """Return expected counts μ (B, L), 0 at positions without a gene.

        Parameters
        ----------
        hidden, gene_embedding
            States and gene embeddings (B, L, D).
        gene_tokens, is_gene
            Genes (B, L), and mask of the positions with a gene (B, L).
        counts
            Observed counts (B, L); the softmax link distributes their sum over the genes of a cell.
        """
        mu = apply_link(self.before_link(hidden, gene_embedding, gene_tokens), self.link, counts, is_gene)
        return mu.masked_fill(~is_gene, 0)

    def before_link(self, hidden: Tensor, gene_embedding: Tensor, gene_tokens: Tensor) -> Tensor:
        """Return u (…), which the link function maps to expected counts, of states and gene embeddings (…, D)."""
        u = self.mlp(torch.cat([hidden, gene_embedding], dim=-1)) + self.gene_embedding(gene_tokens)  # (…, 1)
        return u.squeeze(-1).float()

    def project_genes(self, gene_embedding: Tensor) -> Tensor:
        """Return what the MLP's first layer makes of genes (Q, D), for `before_link_of_pairs`: (Q, D / 2)."""
        first = self.mlp.layers[0]
        return F.linear(gene_embedding.to(first.weight.dtype), first.weight[:, gene_embedding.shape[1] :])  # type: ignore[arg-type,index]

    def before_link_of_pairs(self, hidden: Tensor, projected_genes: Tensor, gene_tokens: Tensor) -> Tensor:
        """Return u (B, Q) of every state (B, D) with every gene (Q,), without running the first layer on each pair."""
        first, *others = self.mlp.layers
        states = F.linear(hidden.to(first.weight.dtype), first.weight[:, : hidden.shape[1]], first.bias)  # type: ignore[arg-type,index]
        rest = nn.Sequential(*others)
        u = torch.stack([rest(state + projected_genes).float() for state in states])  # (B, Q, 1)
        return (u + self.gene_embedding(gene_tokens)).squeeze(-1).float()


def apply_link(u: Tensor, link: str, counts: Tensor, is_gene: Tensor) -> Tensor:
    """Map the count head's output `u` (B, L) to expected counts with the named link function."""
    if link == "softmax":
        share = torch.softmax(u.masked_fill(~is_gene, -torch.inf), dim=-1)
        return share * (counts * is_gene).sum(-1, keepdim=True)
    return ELEMENTWISE_LINK[link](u)
