"""The model as a LightningModule."""

from typing import NamedTuple

import pytorch_lightning as pl
from torch import Tensor

from transcriptformer.config import Config
from transcriptformer.data.dataset import Batch
from transcriptformer.model.transcriptformer import TranscriptFormer


class Prediction(NamedTuple):
    """What was asked for of a batch of B cells; None for the rest.

    Attributes
    ----------
    rows
        Where each cell stands in the dataset (B,).
    embedding
        (B, D)
    llh
        Mean negative log-likelihood of a cell's counts (B,), NaN without genes; the name is the published one.
    """

    rows: Tensor
    embedding: Tensor | None
    llh: Tensor | None


class TranscriptFormerModule(pl.LightningModule):
    """Runs a model on batches, and only the heads that `model.inference_config.output_keys` names."""

    def __init__(self, model: TranscriptFormer, config: Config) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def predict_step(self, batch: Batch, batch_idx: int) -> Prediction:
        """Encode a batch once and run the heads that are wanted."""
        inference, clip_counts = self.config.model.inference_config, self.config.model.data_config.clip_counts
        encoded = self.model(
            batch.gene_tokens,
            batch.gene_counts,
            batch.aux_tokens,
            layer=inference.embedding_layer_index,
            bias_on_diagonal=True,
        )
        wanted = inference.output_keys
        return Prediction(
            rows=batch.rows,
            embedding=self.model.cell_embedding(encoded) if "embeddings" in wanted else None,
            llh=self.model.count_nll(encoded, clip_counts) if "llh" in wanted else None,
        )
