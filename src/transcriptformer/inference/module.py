"""Models with what a run computes from them."""

import numpy as np
import torch

from transcriptformer.config import InferenceConfig
from transcriptformer.data.batches import Batch
from transcriptformer.model.attention.choose import choose_attention
from transcriptformer.model.esm2ce import Esm2CE
from transcriptformer.model.label_head import LabelHead
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.task import CellModule, Prediction
from transcriptformer.runtime.device import compute_dtype
from transcriptformer.storage.results import LABEL, LABEL_PROBABILITY, N_GENES, ROWS


class EmbeddingModule(CellModule):
    """Computes what is requested of a batch.

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
        prediction = {ROWS: batch.rows}
        if "llh" in self.inference.output_keys:
            prediction["llh"] = self.model.count_nll(encoded, self.clip_counts)
        if "embeddings" not in self.inference.output_keys:
            return prediction
        if self.inference.emb_type == "cge":
            n_genes = (batch.gene_tokens != self.pad).sum(1)
            return prediction | {N_GENES: n_genes, "genes": batch.gene_tokens, "cge_embeddings": encoded.hidden}
        embeddings = self.model.cell_embedding(encoded)
        if self.label_head is not None:
            best = self.label_head(embeddings).softmax(1).max(1)
            prediction |= {LABEL: best.indices, LABEL_PROBABILITY: best.values}
        return prediction | {"embeddings": embeddings}


class Esm2CEModule(EmbeddingModule):
    """The ESM2-CE baseline, without a transformer."""

    model: Esm2CE

    def __init__(self, model: Esm2CE, inference: InferenceConfig, pad: int) -> None:
        super().__init__(inference, pad)
        self.model = model

    def predict(self, batch: Batch) -> Prediction:  # noqa: D102
        if self.inference.emb_type == "cell":
            return {ROWS: batch.rows, "embeddings": self.model.cell_embedding(batch.gene_tokens)}
        genes = batch.gene_tokens
        n_genes, embeddings = (genes != self.pad).sum(1), self.model.gene_embedding(genes)
        return {ROWS: batch.rows, N_GENES: n_genes, "genes": genes, "cge_embeddings": embeddings}
