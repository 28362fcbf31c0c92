"""TranscriptFormer: single-cell embeddings from RNA counts, for any species.

>>> import transcriptformer as tf
>>> model = tf.load("checkpoints/tf_sapiens")
>>> tf.embed(adata, model)                    # adds adata.obsm["X_transcriptformer"]
>>> tf.embed("cells.h5ad", model)             # a new AnnData
>>> tf.gene_embeddings(adata, model)          # mean contextual embedding of each gene
>>> tf.next_genes(model, [["CD3E", "CD8A"]])  # probability of each gene to come next
>>> tf.score(adata, model)                    # how likely the model finds each cell
>>> tf.perturb(adata, model, knock_out=["CD79A"])  # how far a gene moves each cell's embedding

Importing the package is cheap; PyTorch is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transcriptformer.errors import TranscriptFormerError

if TYPE_CHECKING:
    from transcriptformer.api import embed, gene_embeddings, load, perturb, score
    from transcriptformer.generation.generate import generate
    from transcriptformer.generation.groups import next_genes_of_cells
    from transcriptformer.generation.impute import impute
    from transcriptformer.generation.next_genes import next_genes
    from transcriptformer.generation.pmi import pmi

__all__ = [
    "TranscriptFormerError",
    "embed",
    "gene_embeddings",
    "generate",
    "impute",
    "load",
    "next_genes",
    "next_genes_of_cells",
    "perturb",
    "pmi",
    "score",
]

_MODULE_OF = {
    "embed": "api",
    "gene_embeddings": "api",
    "generate": "generation.generate",
    "impute": "generation.impute",
    "load": "api",
    "next_genes": "generation.next_genes",
    "perturb": "api",
    "score": "api",
    "next_genes_of_cells": "generation.groups",
    "pmi": "generation.pmi",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"transcriptformer.{_MODULE_OF[name]}"), name)
    if name == "__version__":
        return import_module("importlib.metadata").version("transcriptformer")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
