"""Embed cells: in memory, or from files to a file."""

from collections.abc import Sequence
from pathlib import Path

import anndata

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.config import Config
from transcriptformer.data.store import Location
from transcriptformer.inference.embeddings import Embeddings
from transcriptformer.runs.recording import OnProgress
from transcriptformer.runs.run import Source, run_in_memory, run_on_files


def embed(
    sources: Source | Sequence[Source],
    checkpoint: Checkpoint,
    on_progress: OnProgress | None = None,
) -> anndata.AnnData:
    """Embed the cells of one or more sources, in order, on one device and in memory.

    Parameters
    ----------
    sources
        h5ad file, zarr store or AnnData object, or a list of these; not modified.
    checkpoint
        Checkpoint from `load_checkpoint`; its configuration determines what is computed.
    on_progress
        Called before the first batch and after each batch.

    Returns
    -------
    An AnnData with the cells that passed the filters: their `obs`, `obsm['embeddings']` (cells, D), float32, or
    contextual gene embeddings in `uns`, `uns['llh']` if requested, and the provenance in `uns['transcriptformer']`.
    Pooled gene embeddings are returned as an AnnData with one row per gene, or per gene and group.

    Raises
    ------
    TranscriptFormerError
        If a source cannot be used, or an option does not apply to it.
    """
    return run_in_memory(sources, Embeddings(checkpoint), on_progress)


def run(
    names: Sequence[Location], checkpoint_path: Path, config: Config, on_progress: OnProgress | None = None
) -> Path | None:
    """Run `transcriptformer inference`: embed the cells of files or stores and write one file or store.

    Parameters and errors are those of `transcriptformer.runs.run.run_on_files`.
    """
    return run_on_files(names, checkpoint_path, config, Embeddings, on_progress)
