"""TranscriptFormer: an expression-aware causal transformer over genes and their counts, with coupled heads for both.

Notation: B cells, L gene positions (a batch's own, at most `seq_len`), A auxiliary tokens, T = A + L,
D width of a state, V gene vocabulary, P width of the protein embeddings.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transcriptformer.config import LossConfig, ModelConfig
from transcriptformer.errors import UsageError
from transcriptformer.model.attention.definition import ScoreMod, count_bias
from transcriptformer.model.layers import MLP, CountHead, Encoder, GeneEmbedding
from transcriptformer.model.losses import gene_cross_entropy, mean_over_genes, zero_truncated_poisson_nll
from transcriptformer.vocab import AuxVocab, GeneVocab


class Encoded(NamedTuple):
    """A batch after the encoder: the state at each position and what that position predicts.

    Attributes
    ----------
    hidden
        States (B, L, D); the one at position j has seen the genes before g_j and predicts g_j.
    is_input
        Positions whose input is not [PAD] (B, L): [START] and the genes that have been seen.
    is_gene
        Positions that predict a gene of the cell (B, L).
    gene_tokens, gene_counts
        The predicted genes and counts (B, L), as they came.
    """

    hidden: Tensor
    is_input: Tensor
    is_gene: Tensor
    gene_tokens: Tensor
    gene_counts: Tensor


class TranscriptFormer(nn.Module):
    """The model; see `forward` for the encoder, and one method per head.

    Parameters
    ----------
    config, loss_config
        The architecture; without weight on the gene loss there is no gene head.
    gene_vocab, aux_vocabs
        The vocabularies, for their sizes and special tokens.
    protein_dim
        Width of the protein embeddings, P.
    """

    def __init__(
        self,
        config: ModelConfig,
        loss_config: LossConfig,
        gene_vocab: GeneVocab,
        aux_vocabs: Mapping[str, AuxVocab],
        protein_dim: int,
    ) -> None:
        super().__init__()
        self.config, self.loss_config = config, loss_config
        self.pad, self.start, self.end = gene_vocab.pad, gene_vocab.start, gene_vocab.end
        self.unknown_aux = [vocab.unknown for vocab in aux_vocabs.values()]

        n_genes, dim, dropout = len(gene_vocab), config.embed_dim, config.dropout
        self.gene_embeddings = GeneEmbedding(n_genes, protein_dim, dim, dropout)
        for name in aux_vocabs:
            if hasattr(nn.ModuleDict(), name):
                raise UsageError(f"model.data_config.aux_cols: {name!r} has a meaning in PyTorch; rename that column")
        self.aux_embeddings = nn.ModuleDict({name: nn.Embedding(len(v), dim) for name, v in aux_vocabs.items()})
        self.transformer_encoder = Encoder(config)
        self.mu = CountHead(n_genes, dim, dropout, config.mu_link_fn)
        self.gene_id_head = (
            MLP(dim, config.gene_head_hidden_dim, n_genes, dropout) if loss_config.gene_id_loss_weight > 0 else None
        )

    def replace_genes(self, protein_embedding: Tensor) -> None:
        """Take the genes of another species, special tokens included, by their protein embeddings (V, P).

        What the count head adds for a gene is not known of new ones: 0. The gene head keeps meaning the trained genes.
        """
        n_genes, protein_dim = protein_embedding.shape
        self.gene_embeddings.embedding = nn.Embedding(n_genes, protein_dim, _weight=protein_embedding, _freeze=True)
        self.gene_embeddings.table = None
        self.mu.gene_embedding = nn.Embedding(n_genes, 1, _weight=protein_embedding.new_zeros(n_genes, 1))

    def forward(
        self,
        gene_tokens: Tensor,
        gene_counts: Tensor,
        aux_tokens: Tensor,
        *,
        layer: int = -1,
        bias_on_diagonal: bool = False,
    ) -> Encoded:
        """Run the encoder; no head runs unless its method is called on the result.

        Parameters
        ----------
        gene_tokens, gene_counts
            (B, L); a cell's genes, then [PAD] with count 0. Where L < `seq_len`, the last position is [PAD] in every
            cell, so that nothing is lost when [START] moves the genes up by one.
        aux_tokens
            (B, A)
        layer
            Block whose output to return, from 0; negative from the end.
        bias_on_diagonal
            True for embeddings and likelihoods; False, the default, while training.
        """
        n_aux = aux_tokens.shape[1]
        tokens = torch.cat([torch.full_like(gene_tokens[:, :1], self.start), gene_tokens[:, :-1]], dim=1)  # (B, L)
        counts = torch.cat([torch.ones_like(gene_counts[:, :1]), gene_counts[:, :-1]], dim=1)  # (B, L)
        counts = torch.cat([torch.ones_like(aux_tokens, dtype=counts.dtype), counts], dim=1)  # (B, T)

        is_input = tokens != self.pad
        aux_known = [aux_tokens[:, i : i + 1] != unknown for i, unknown in enumerate(self.unknown_aux)]  # A × (B, 1)
        key_allowed = torch.cat([*aux_known, is_input], dim=1)  # (B, T)
        key_bias = count_bias(counts, self.config.log_counts_eps)  # (B, T)

        aux = [embed(aux_tokens[:, i : i + 1]) for i, embed in enumerate(self.aux_embeddings.values())]  # A × (B, 1, D)
        x = torch.cat([*aux, self.gene_embeddings(tokens)], dim=1)  # (B, T, D)
        mod = ScoreMod(key_bias, key_allowed, self.config.softcap, bias_on_diagonal)
        x = self.transformer_encoder(x, mod, layer)
        return Encoded(x[:, n_aux:], is_input, gene_tokens != self.pad, gene_tokens, gene_counts)

    def cell_embedding(self, encoded: Encoded) -> Tensor:
        """Sum of the states of [START] and the seen genes, divided by `seq_len` (not by how many they are): (B, D)."""
        return (encoded.hidden * encoded.is_input[..., None]).sum(1) / self.config.seq_len

    def expected_counts(self, encoded: Encoded) -> Tensor:
        """Expected count μ of each gene of the cell (B, L); 0 at other positions."""
        genes = encoded.gene_tokens
        return self.mu(encoded.hidden, self.gene_embeddings(genes), genes, encoded.gene_counts, encoded.is_gene)

    def gene_logits(self, hidden: Tensor) -> Tensor:
        """Logits (…, V) of the gene that each state (…, D) predicts, soft-capped."""
        if self.gene_id_head is None:
            raise ValueError("this model was built without a gene head (gene_id_loss_weight is 0)")
        logits = self.gene_id_head(hidden)
        softcap = self.config.softcap
        return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits

    def gene_targets(self, encoded: Encoded) -> Tensor:
        """What the gene logits should point at (B, L): each position's gene, and [END] at position `seq_len`."""
        targets = encoded.gene_tokens.clone()
        targets[:, self.config.seq_len - 1 :] = self.end
        return targets

    def gene_nll(self, encoded: Encoded) -> Tensor:
        """Negative log-likelihood of each cell's genes, mean over genes (B,); NaN without genes."""
        n_genes = len(self.mu.gene_embedding.weight)
        targets = self.gene_targets(encoded)
        nll = gene_cross_entropy(self.gene_logits, encoded.hidden, targets, encoded.is_gene, n_genes)
        return mean_over_genes(nll, encoded.is_gene)

    def count_nll(self, encoded: Encoded, clip_counts: float) -> Tensor:
        """Negative log-likelihood of each cell's counts given its genes, mean over genes (B,); NaN without genes."""
        targets = encoded.gene_counts.clone()
        targets[:, self.config.seq_len - 1 :] = 1
        nll = zero_truncated_poisson_nll(
            self.expected_counts(encoded),
            targets,
            self.config.log_counts_eps,
            clip_counts,
            self.loss_config.softplus_approx,
        )
        return mean_over_genes(nll, encoded.is_gene)
