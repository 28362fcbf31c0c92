"""TranscriptFormer: embeddings of single cells from their RNA counts, for any species.

This module imports nothing heavy; the work is in `transcriptformer.inference` (`embed`), `transcriptformer.checkpoint`
(`load_checkpoint`) and `transcriptformer.config` (`load_config`).
"""

from transcriptformer.errors import TranscriptFormerError

__all__ = ["TranscriptFormerError"]
