"""The model with what prepares it for a run."""

import numpy as np
import torch

from transcriptformer.config import InferenceConfig
from transcriptformer.model.attention.choose import choose_attention
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.task import CellModule
from transcriptformer.runtime.device import compute_dtype


class EncoderModule(CellModule):
    """Runs a TranscriptFormer on batches.

    Parameters
    ----------
    inference
        Settings of the run.
    """

    def __init__(self, model: TranscriptFormer, inference: InferenceConfig) -> None:
        super().__init__()
        self.model, self.inference = model, inference

    def prepare(self, lengths: np.ndarray, device: torch.device) -> None:
        """Choose the attention and cache gene embeddings, given the number of genes of each cell (cells,)."""
        prepare_encoder(self.model, self.inference, lengths, device)


def prepare_encoder(
    model: TranscriptFormer, inference: InferenceConfig, lengths: np.ndarray, device: torch.device
) -> None:
    """Choose the attention for cells with some numbers of genes (cells,), and cache gene embeddings.

    The model must be on the device.
    """
    dtype = compute_dtype(inference.precision, device)
    model.transformer_encoder.attention = choose_attention(inference.attention, device, dtype, model.config, lengths)
    model.gene_embeddings.keep_embeddings()
