"""TranscriptFormer: single-cell embeddings from RNA counts, for any species.

>>> import transcriptformer as tf
>>> model = tf.load("checkpoints/tf_sapiens")
>>> tf.embed(adata, model)                    # adds adata.obsm["X_transcriptformer"]
>>> tf.embed("cells.h5ad", model)             # a new AnnData
>>> tf.gene_embeddings(adata, model)          # mean contextual embedding of each gene

Importing the package is cheap; PyTorch is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transcriptformer.errors import TranscriptFormerError

if TYPE_CHECKING:
    from transcriptformer.api import embed, gene_embeddings, load

__all__ = ["TranscriptFormerError", "embed", "gene_embeddings", "load"]


def __getattr__(name: str) -> Any:
    if name in ("embed", "gene_embeddings", "load"):
        return getattr(import_module("transcriptformer.api"), name)
    if name == "__version__":
        return import_module("importlib.metadata").version("transcriptformer")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
