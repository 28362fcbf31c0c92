"""Predictions of the model, checked for values that overflow."""

import torch
from torch import Tensor

from transcriptformer.errors import TranscriptFormerError
from transcriptformer.model.transcriptformer import TranscriptFormer


def gene_log_probabilities(model: TranscriptFormer, hidden: Tensor) -> Tensor:
    """Return log-probabilities (…, V), float32, of the gene that each state (…, D) predicts, over all tokens.

    Raises
    ------
    TranscriptFormerError
        If they are NaN.
    """
    log_p = model.gene_logits(hidden).float().log_softmax(-1)
    require_finite("probabilities", log_p)
    return log_p


def require_finite(name: str, values: Tensor) -> None:
    """Raise TranscriptFormerError if values are NaN or infinite; probabilities may be 0, of logarithm -∞."""
    if bool((values.isnan() | (values == torch.inf)).any()):
        raise TranscriptFormerError(
            f"{name} are NaN or infinite: weights or counts are too large for this precision; use --precision 32"
        )
