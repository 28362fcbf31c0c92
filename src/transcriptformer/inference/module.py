"""Models with what a run computes from them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from transcriptformer.config import InferenceConfig
from transcriptformer.data.batches import Batch
from transcriptformer.model.attention.choose import choose_attention
from transcriptformer.model.esm2ce import Esm2CE
from transcriptformer.model.label_head import LabelHead
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runtime.device import compute_dtype
from transcriptformer.runtime.memory import Halving


class Prediction(NamedTuple):
    """Requested results for a batch of B cells; other fields are None.

    Attributes
    ----------
    rows
        Index of each cell among the kept cells (B,).
    embeddings
        (B, D)
    llh
        Mean negative log-likelihood of a cell's counts (B,), NaN without genes; named as in the published package.
    label, label_probability
        Index of the most probable label of each cell (B,), and its probability.
    n_genes
        Number of genes of each cell, after truncation (B,).
    genes, cge_embeddings
        Gene tokens (B, L) and contextual gene embeddings (B, L, D); only the first `n_genes` per cell are valid.
        Removing the others here would synchronize a GPU.
    """

    rows: Tensor
    embeddings: Tensor | None = None
    llh: Tensor | None = None
    label: Tensor | None = None
    label_probability: Tensor | None = None
    n_genes: Tensor | None = None
    genes: Tensor | None = None
    cge_embeddings: Tensor | None = None


class EmbeddingModule(nn.Module):
    """Runs a model on batches; batches that run out of memory are halved.

    Parameters
    ----------
    inference
        Settings of the run.
    pad
        Padding token of genes.
    """

    def __init__(self, inference: InferenceConfig, pad: int) -> None:
        super().__init__()
        self.inference, self.pad = inference, pad
        self.halving = Halving(self.predict, _size, _split, _join, "cell", "use another device or --precision 16-mixed")

    def forward(self, batch: Batch) -> Prediction:
        """Predict a batch; one that runs out of memory is halved, as are later ones of its size."""
        return self.halving(batch)

    def prepare(self, lengths: np.ndarray, device: torch.device) -> None:
        """Prepare for a run on a device, given the number of genes of each cell (cells,)."""

    def predict(self, batch: Batch) -> Prediction:
        """Predict a batch as a whole."""
        raise NotImplementedError


def _size(batch: Batch) -> tuple[int, int]:
    return len(batch.rows), batch.gene_tokens.numel()


def _split(batch: Batch) -> tuple[Batch, Batch]:
    middle = len(batch.rows) // 2
    return Batch(*(x[:middle] for x in batch)), Batch(*(x[middle:] for x in batch))


def _join(first: Prediction, second: Prediction) -> Prediction:
    parts = zip(Prediction._fields, first, second, strict=True)
    return Prediction(**{name: torch.cat([a, b]) for name, a, b in parts if a is not None and b is not None})


class TranscriptFormerModule(EmbeddingModule):
    """TranscriptFormer with the heads needed for `model.inference_config.output_keys`."""

    model: TranscriptFormer
    label_head: LabelHead | None

    def __init__(
        self,
        model: TranscriptFormer,
        inference: InferenceConfig,
        clip_counts: float,
        pad: int,
        label_head: LabelHead | None = None,
    ) -> None:
        super().__init__(inference, pad)
        self.model, self.clip_counts, self.label_head = model, clip_counts, label_head

    def prepare(self, lengths: np.ndarray, device: torch.device) -> None:
        """Choose the attention and cache gene embeddings, given the number of genes of each cell (cells,)."""
        dtype = compute_dtype(self.inference.precision, device)
        self.model.transformer_encoder.attention = choose_attention(
            self.inference.attention, device, dtype, self.model.config, lengths
        )
        self.model.gene_embeddings.keep_embeddings()

    def predict(self, batch: Batch) -> Prediction:  # noqa: D102
        encoded = self.model(
            batch.gene_tokens,
            batch.gene_counts,
            batch.aux_tokens,
            layer=self.inference.embedding_layer_index,
            bias_on_diagonal=True,
        )
        prediction = Prediction(batch.rows)
        if "llh" in self.inference.output_keys:
            prediction = prediction._replace(llh=self.model.count_nll(encoded, self.clip_counts))
        if "embeddings" not in self.inference.output_keys:
            return prediction
        if self.inference.emb_type == "cell":
            embeddings = self.model.cell_embedding(encoded)
            if self.label_head is not None:
                best = self.label_head(embeddings).softmax(1).max(1)
                prediction = prediction._replace(label=best.indices, label_probability=best.values)
            return prediction._replace(embeddings=embeddings)
        n_genes = (batch.gene_tokens != self.pad).sum(1)
        return prediction._replace(n_genes=n_genes, genes=batch.gene_tokens, cge_embeddings=encoded.hidden)


class Esm2CEModule(EmbeddingModule):
    """The ESM2-CE baseline, without a transformer."""

    model: Esm2CE

    def __init__(self, model: Esm2CE, inference: InferenceConfig, pad: int) -> None:
        super().__init__(inference, pad)
        self.model = model

    def predict(self, batch: Batch) -> Prediction:  # noqa: D102
        if self.inference.emb_type == "cell":
            return Prediction(batch.rows, embeddings=self.model.cell_embedding(batch.gene_tokens))
        genes = batch.gene_tokens
        n_genes, embeddings = (genes != self.pad).sum(1), self.model.gene_embedding(genes)
        return Prediction(batch.rows, n_genes=n_genes, genes=genes, cge_embeddings=embeddings)
