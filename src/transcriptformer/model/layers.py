"""The parts of the model.

Names of modules are those of the published weights (`transformer_encoder.encoder_layers.0.…`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transcriptformer.config import ModelConfig
from transcriptformer.model.attention.blockwise import blockwise_attention
from transcriptformer.model.attention.definition import Attention, ScoreMod

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}

ELEMENTWISE_LINK: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "linear": lambda u: u,
}


GENES_AT_ONCE = 4096
"""Genes whose protein embeddings are brought to the model's width at a time."""


class Linear(nn.Linear):
    """A linear layer that takes its input in any type and computes in the type of its weight."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """A layer norm that takes its input in any type and computes in float32."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return super().forward(x.float())


class MLP(nn.Module):
    """Linear, ReLU, LayerNorm, dropout, linear; the result is float32."""

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
        """Weight of the last layer (out_dim, hidden_dim)."""
        return self.layers[-1].weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis of `x` (…, in_dim): (…, out_dim)."""
        return self.layers(x).float()


class GeneEmbedding(nn.Module):
    """Protein embeddings (V, P), frozen, brought to the model's width by an MLP."""

    def __init__(self, n_genes: int, protein_dim: int, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_genes, protein_dim)
        self.embedding.weight.requires_grad_(False)
        self.mlp = MLP(protein_dim, embed_dim, embed_dim, dropout)
        self.table: Tensor | None = None  # made by keep_embeddings, with is_known beside it

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings (…, D) of gene tokens (…); the MLP runs once per distinct gene."""
        if self.table is None:
            distinct, place = torch.unique(tokens, return_inverse=True)
            return F.embedding(place, self.mlp(self.embedding(distinct)))
        if self.table.device.type == "cpu":  # elsewhere, asking which genes are missing would make the device wait
            self._tabulate(torch.unique(tokens[~self.is_known[tokens]]))
        return F.embedding(tokens, self.table)

    def keep_embeddings(self) -> None:
        """From now on, run the MLP once per gene; its weights must not change any more.

        On a GPU that is done at once for all genes, on a CPU for those that come, when they come.
        """
        protein = self.embedding.weight
        if self.table is not None and self.table.device == protein.device:
            return
        # In the type in which the MLP's last product was rounded: nothing is lost.
        like = self.mlp.last_weight
        self.table = like.new_empty(len(protein), len(like), device=protein.device)
        self.is_known = torch.zeros(len(protein), dtype=torch.bool, device=protein.device)
        if protein.device.type != "cpu":
            self._tabulate(torch.arange(len(protein), device=protein.device))

    @torch.inference_mode()
    def _tabulate(self, genes: Tensor) -> None:
        assert self.table is not None
        for some in torch.split(genes, GENES_AT_ONCE):
            self.table[some] = self.mlp(self.embedding(some)).to(self.table.dtype)
        self.is_known[genes] = True


class SelfAttention(nn.Module):
    """Multi-head attention with the projections q, k, v and out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.linears = nn.ModuleList(Linear(dim, dim, bias=config.attn_bias) for _ in range(4))

    def forward(self, x: Tensor, mod: ScoreMod, attention: Attention) -> Tensor:
        """Let every position attend to earlier ones: (B, T, D) → (B, T, D)."""
        to_q, to_k, to_v, to_out = self.linears
        x = x.to(to_q.weight.dtype)  # type: ignore[arg-type]  # once for the three of them
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, T, D) → (B, H, T, d)
            for project in (to_q, to_k, to_v)
        )
        values = attention(q, k, v, mod)
        return to_out(values.transpose(1, 2).flatten(2))  # (B, H, T, d) → (B, T, D)


class Block(nn.Module):
    """Attention and feed-forward; the residual carries the normed state."""

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

    def forward(self, x: Tensor, mod: ScoreMod, attention: Attention) -> Tensor:
        """One step of the encoder: (B, T, D) → (B, T, D), float32."""
        x = self.norm1(x)
        x = x + self.self_attn(x, mod, attention)
        x = self.norm2(x)
        return x + self.linear2(self.dropout(self.activation(self.linear1(x))))


class Encoder(nn.Module):
    """The stack of blocks; there is no norm after the last one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder_layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.attention: Attention = blockwise_attention

    def forward(self, x: Tensor, mod: ScoreMod, layer: int) -> Tensor:
        """States (B, T, D) after block `layer`, from 0, negative from the end; the blocks after it do not run."""
        for block in self.encoder_layers[: layer % len(self.encoder_layers) + 1]:
            x = block(x, mod, self.attention)
        return x


class CountHead(nn.Module):
    """Expected count of a gene, from the state that predicts it and the gene itself."""

    def __init__(self, n_genes: int, embed_dim: int, dropout: float, link: str) -> None:
        super().__init__()
        self.gene_embedding = nn.Embedding(n_genes, 1)  # a bias per gene
        self.mlp = MLP(2 * embed_dim, embed_dim // 2, 1, dropout)
        self.link = link

    def forward(
        self, hidden: Tensor, gene_embedding: Tensor, gene_tokens: Tensor, counts: Tensor, is_gene: Tensor
    ) -> Tensor:
        """Expected counts μ (B, L); 0 where there is no gene.

        Parameters
        ----------
        hidden, gene_embedding
            (B, L, D)
        gene_tokens, counts, is_gene
            (B, L); the softmax link shares out the sum of `counts` over a cell's genes.
        """
        u = self.mlp(torch.cat([hidden, gene_embedding], dim=-1)) + self.gene_embedding(gene_tokens)  # (B, L, 1)
        mu = apply_link(u.squeeze(-1).float(), self.link, counts, is_gene)
        return mu.masked_fill(~is_gene, 0)


def apply_link(u: Tensor, link: str, counts: Tensor, is_gene: Tensor) -> Tensor:
    """Expected counts from the count head's output `u` (B, L), by the link function of that name."""
    if link == "softmax":
        share = torch.softmax(u.masked_fill(~is_gene, -torch.inf), dim=-1)
        return share * (counts * is_gene).sum(-1, keepdim=True)
    return ELEMENTWISE_LINK[link](u)
