"""TranscriptFormer: an expression-aware causal transformer over genes and counts, with a head for each.

Notation: B cells, L gene positions of a batch (at most `seq_len`), A auxiliary tokens, T = A + L, state width D,
vocabulary size V, protein-embedding width P.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transcriptformer.config import LossConfig, ModelConfig
from transcriptformer.errors import UsageError
from transcriptformer.model.attention.definition import ScoreMod, count_bias
from transcriptformer.model.cache import KeyValueCache
from transcriptformer.model.layers import MLP, CountHead, Encoder, GeneEmbedding
from transcriptformer.model.losses import gene_cross_entropy, mean_over_genes, zero_truncated_poisson_nll
from transcriptformer.vocab import AuxVocab, GeneVocab


class Encoded(NamedTuple):
    """Output of the encoder, aligned with the genes that each position predicts.

    Attributes
    ----------
    hidden
        States (B, L, D); the state at position j depends on the genes before g_j and predicts g_j.
    is_input
        Mask of the positions whose input is not [PAD] (B, L): [START] and all genes but the last.
    is_gene
        Mask of the positions that predict a gene of the cell (B, L).
    gene_tokens, gene_counts
        Predicted genes and counts (B, L), as passed to `forward`.
    """

    hidden: Tensor
    is_input: Tensor
    is_gene: Tensor
    gene_tokens: Tensor
    gene_counts: Tensor


class TranscriptFormer(nn.Module):
    """The model: `forward` runs the encoder, and one method per head computes predictions from its output.

    Parameters
    ----------
    config, loss_config
        Architecture; with a gene loss weight of 0 there is no gene head.
    gene_vocab, aux_vocabs
        Vocabularies, for their sizes and special tokens.
    protein_dim
        Protein-embedding width, P.
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
                raise UsageError(f"model.data_config.aux_cols: {name!r} is a name PyTorch reserves; rename the column")
        self.aux_embeddings = nn.ModuleDict({name: nn.Embedding(len(v), dim) for name, v in aux_vocabs.items()})
        self.transformer_encoder = Encoder(config)
        self.mu = CountHead(n_genes, dim, dropout, config.mu_link_fn)
        self.gene_id_head = (
            MLP(dim, config.gene_head_hidden_dim, n_genes, dropout) if loss_config.gene_id_loss_weight > 0 else None
        )

    @property
    def max_genes(self) -> int:
        """Number of genes of a cell that the model predicts: at the last of its positions, it has learned [END]."""
        return self.config.seq_len - 1

    def replace_genes(self, protein_embedding: Tensor) -> None:
        """Replace the vocabulary by another species', given its protein embeddings (V, P), special tokens included.

        The count head's per-gene biases become 0. The gene head still predicts the trained genes.
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
        """Run the encoder, without any head.

        Parameters
        ----------
        gene_tokens, gene_counts
            Genes of each cell, then [PAD] with count 0 (B, L). If L < `seq_len`, the last position must be [PAD] in
            every cell, because [START] shifts the genes by one.
        aux_tokens
            Auxiliary tokens (B, A).
        layer
            Block whose output is returned, counted from 0, or from the end if negative.
        bias_on_diagonal
            Whether a query adds the count bias to its own key: True for embeddings and likelihoods, False for training.
        """
        n_aux = aux_tokens.shape[1]
        tokens = torch.cat([torch.full_like(gene_tokens[:, :1], self.start), gene_tokens[:, :-1]], dim=1)  # (B, L)
        counts = torch.cat([torch.ones_like(gene_counts[:, :1]), gene_counts[:, :-1]], dim=1)  # (B, L)
        x, key_bias, key_allowed = self._inputs(tokens, counts, aux_tokens)
        mod = ScoreMod(key_bias, key_allowed, self.config.softcap, bias_on_diagonal)
        x = self.transformer_encoder(x, mod, layer)
        is_input = key_allowed[:, n_aux:]
        return Encoded(x[:, n_aux:], is_input, gene_tokens != self.pad, gene_tokens, gene_counts)

    def begin(self, aux_tokens: Tensor, n_genes: int) -> tuple[KeyValueCache, Tensor]:
        """Begin cells that grow gene by gene, by `extend`.

        Parameters
        ----------
        aux_tokens
            Auxiliary tokens (B, A).
        n_genes
            Maximum number of genes, including [PAD], that will be appended.

        Returns
        -------
        The cache, with the auxiliary tokens and [START], and the states (B, 1, D) that predict the first gene.
        """
        config, like = self.config, next(self.transformer_encoder.parameters())  # the projection to queries
        cells, head_dim = len(aux_tokens), config.embed_dim // config.num_heads
        shape = cells, config.num_heads, aux_tokens.shape[1] + 1 + n_genes, head_dim
        cache = KeyValueCache(config.num_layers, shape, like.dtype, like.device)
        start = aux_tokens.new_full((cells, 1), self.start)
        return cache, self._append(cache, start, torch.ones_like(start, dtype=torch.float32), aux_tokens)[:, -1:]

    def extend(self, cache: KeyValueCache, gene_tokens: Tensor, gene_counts: Tensor) -> Tensor:
        """Append the next genes of each cell to the cache, and return the state after each (B, n, D).

        A state predicts the gene that follows. It equals that of `forward` without the bias on the diagonal.

        Parameters
        ----------
        gene_tokens, gene_counts
            Next genes (B, n); [PAD] with count 0 where a cell has none, which later positions do not see.
        """
        return self._append(cache, gene_tokens, gene_counts, gene_tokens[:, :0])

    def _append(self, cache: KeyValueCache, tokens: Tensor, counts: Tensor, aux_tokens: Tensor) -> Tensor:
        x, *masks = self._inputs(tokens, counts, aux_tokens)
        mod = ScoreMod(*cache.append_masks(*masks), self.config.softcap, bias_on_diagonal=False)
        return self.transformer_encoder.extend(x, mod, cache)

    def _inputs(self, tokens: Tensor, counts: Tensor, aux_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return input states (B, T, D), and bias and mask of the keys (B, T), of auxiliary tokens and then genes."""
        counts = torch.cat([torch.ones_like(aux_tokens, dtype=counts.dtype), counts], dim=1)  # (B, T)
        aux_known = [aux_tokens[:, i : i + 1] != unknown for i, unknown in enumerate(self.unknown_aux)]  # A × (B, 1)
        key_allowed = torch.cat([*aux_known, tokens != self.pad], dim=1)  # (B, T)
        key_bias = count_bias(counts, self.config.log_counts_eps)  # (B, T)
        aux = [embed(aux_tokens[:, i : i + 1]) for i, embed in enumerate(self.aux_embeddings.values())]  # A × (B, 1, D)
        return torch.cat([*aux, self.gene_embeddings(tokens)], dim=1), key_bias, key_allowed  # (B, T, D)

    def cell_embedding(self, encoded: Encoded) -> Tensor:
        """Sum the states at input positions and divide by `seq_len`, not by the number of positions: (B, D)."""
        return (encoded.hidden * encoded.is_input[..., None]).sum(1) / self.config.seq_len

    def expected_counts(self, encoded: Encoded) -> Tensor:
        """Return the expected count μ of each gene (B, L), 0 at positions without a gene."""
        genes = encoded.gene_tokens
        return self.mu(encoded.hidden, self.gene_embeddings(genes), genes, encoded.gene_counts, encoded.is_gene)

    def gene_logits(self, hidden: Tensor) -> Tensor:
        """Return soft-capped logits (…, V) of the gene that each state (…, D) predicts."""
        if self.gene_id_head is None:
            raise ValueError("this model has no gene head (gene_id_loss_weight is 0)")
        logits = self.gene_id_head(hidden)
        softcap = self.config.softcap
        return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits

    def gene_targets(self, encoded: Encoded) -> Tensor:
        """Return the targets of the gene logits (B, L): the gene of each position, and [END] at position `seq_len`."""
        targets = encoded.gene_tokens.clone()
        targets[:, self.config.seq_len - 1 :] = self.end
        return targets

    def gene_losses(self, encoded: Encoded) -> Tensor:
        """Return the negative log-likelihood of each gene (B, L), 0 at positions without a gene."""
        n_genes = len(self.mu.gene_embedding.weight)
        targets = self.gene_targets(encoded)
        return gene_cross_entropy(self.gene_logits, encoded.hidden, targets, encoded.is_gene, n_genes)

    def gene_nll(self, encoded: Encoded) -> Tensor:
        """Return the negative log-likelihood of each cell's genes, averaged over genes (B,); NaN without genes."""
        return mean_over_genes(self.gene_losses(encoded), encoded.is_gene)

    def count_nll(self, encoded: Encoded, clip_counts: float) -> Tensor:
        """Return the training loss of counts given genes, averaged over each cell's genes (B,).

        It is NaN for cells without genes.
        """
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
