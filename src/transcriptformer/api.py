"""The Python API; people find it as `transcriptformer.load`, `.embed` and `.gene_embeddings`."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from transcriptformer.checkpoint.load import Checkpoint, load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.config import InferenceConfig
from transcriptformer.data.source import AUTO_GENE_COLUMN
from transcriptformer.errors import UsageError
from transcriptformer.inference.output import EMBEDDINGS_KEY, LLH_KEY, predicted_labels, to_rows_of_genes
from transcriptformer.inference.recording import MemoryRecorder
from transcriptformer.inference.run import Source, compute, survey_sources
from transcriptformer.inference.run import embed as embed_sources

logger = logging.getLogger(__name__)

FileOrFiles = str | Path | Sequence[str | Path]

_DATA, _INFERENCE = "model.data_config.", "model.inference_config."

_DECIDED_BY_CALLS = ("emb_type", "cge_pool", "output_path", "output_filename", "resume", "num_gpus", "num_nodes")
"""Settings of the command that have no effect here: what is computed says the function, and it returns the result."""


def load(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "16-mixed",
    batch_size: int | str = "auto",
    pretrained_embedding: str | Path | Sequence[str | Path] = (),
    settings: Mapping[str, object] | None = None,
) -> Checkpoint:
    """Load a checkpoint.

    Parameters
    ----------
    path
        Its folder: `config.json`, `model_weights.pt`, `vocabs/`.
    device
        cpu, cuda, mps, or auto: the first of cuda, mps, cpu that is there.
    precision
        32; bf16-mixed; or 16-mixed: fp16 on a GPU, on a CPU bf16 where it has instructions for it, else 32.
    batch_size
        Most cells in a batch; auto: as many as fit into free memory.
    pretrained_embedding
        Protein-embedding files of a species that the checkpoint was not trained on.
    settings
        Anything else, by the paths of the configuration, such as `{"model.data_config.clip_counts": 50}`; not what an
        argument says, nor what only the command `inference` does, such as where the result is written.

    Returns
    -------
    A model for `embed` and `gene_embeddings`.

    Raises
    ------
    TranscriptFormerError
        If the checkpoint is incomplete or damaged, or a setting impossible.

    Examples
    --------
    >>> import transcriptformer as tf
    >>> model = tf.load("checkpoints/tf_sapiens")
    >>> tf.embed(adata, model)
    >>> sc.pp.neighbors(adata, use_rep="X_transcriptformer")
    """
    files = [pretrained_embedding] if isinstance(pretrained_embedding, str | Path) else pretrained_embedding
    arguments: dict[str, object] = {
        f"{_INFERENCE}device": device,
        f"{_INFERENCE}precision": precision,
        f"{_INFERENCE}batch_size": batch_size,
        f"{_INFERENCE}pretrained_embedding": [str(file) for file in files],
    }
    settings = settings or {}
    _check_settings(settings, arguments)
    path = Path(path)
    return load_checkpoint(
        path, load_config(path, {f"{_DATA}gene_col_name": AUTO_GENE_COLUMN, **arguments, **settings})
    )


def embed(
    data: anndata.AnnData | FileOrFiles,
    model: Checkpoint,
    *,
    key_added: str = "X_transcriptformer",
    layer: str | None = None,
    use_raw: bool | None = None,
    gene_col_name: str | None = None,
    copy: bool = False,
) -> anndata.AnnData | None:
    """Embed cells.

    Parameters
    ----------
    data
        An AnnData, in memory, backed or a view, whose counts are left as they are; or an h5ad file or zarr store, or
        several.
    model
        From `load`.
    key_added
        Where the embeddings go in `obsm`; what is there is replaced.
    layer
        Take the counts from this layer; None: what the model's settings say, which by default is none.
    use_raw
        Take them from `.raw` (True) or from `.X` (False); None: what the model's settings say, by default `.raw` where
        there is one.
    gene_col_name
        Column of `var` with Ensembl gene ids, or `index`; None: what the model's settings say, by default `ensembl_id`
        where there is such a column, else the index.
    copy
        Return a copy with the embeddings instead of adding them to `data`; that of a backed AnnData is in memory. For
        files the result is always new.

    Returns
    -------
    For an AnnData None, or the copy: `obsm[key_added]` (cells, D), float32, has a row for every cell, NaN for cells
    that the filters of the model's settings leave out; `obs[key_added + '_llh']` if the settings ask for llh; with
    a model that was trained to tell labels, `obs['predicted_…']` and its probability; `uns[key_added]` says how it was
    made. For files a new AnnData of the kept cells with their metadata (`obs_keys` of the model's settings chooses
    columns), with `uns['llh']` if the settings ask for it; `uns['transcriptformer']` says how it was made.

    Raises
    ------
    TranscriptFormerError
        If the data cannot be used; it says why.
    """
    _check_key(key_added)
    model = _with(model, "cell", layer, use_raw, gene_col_name)
    if not isinstance(data, anndata.AnnData):
        result = embed_sources(_files(data), model)
        result.obsm[key_added] = result.obsm.pop(EMBEDDINGS_KEY)
        return result
    target = _target(data, copy)
    cells = survey_sources(data, model)
    computed = compute(cells, model)
    assert isinstance(computed.results, MemoryRecorder)
    kept, n_kept = cells.survey.kept, cells.survey.n_kept
    embeddings = np.full((data.n_obs, model.width), np.nan, dtype=np.float32)
    embeddings[kept] = computed.results.read("embeddings", 0, n_kept)
    target.obsm[key_added] = embeddings
    if "llh" in computed.results.layout:
        llh = np.full(data.n_obs, np.nan, dtype=np.float32)
        llh[kept] = computed.results.read("llh", 0, n_kept)
        target.obs[f"{key_added}_llh"] = llh
    for column, values in predicted_labels(computed.results, 0, n_kept, model.label_head).items():
        target.obs[column] = pd.Series(values, index=np.flatnonzero(kept)).reindex(range(data.n_obs)).array
    target.uns[key_added] = computed.provenance
    return target if copy else None


def gene_embeddings(
    data: anndata.AnnData | FileOrFiles,
    model: Checkpoint,
    *,
    pool: str | None = "gene",
    layer: str | None = None,
    use_raw: bool | None = None,
    gene_col_name: str | None = None,
) -> anndata.AnnData:
    """Contextual gene embeddings: what the model knows of a gene from the genes of a cell that come before it.

    Parameters
    ----------
    data, model, layer, use_raw, gene_col_name
        As for `embed`.
    pool
        gene: the mean over cells for every gene; a column of `obs`: for every gene and value of that column; None: a
        vector for every gene of every cell, which takes (genes of all cells) × D × 4 bytes of memory.

    Returns
    -------
    An AnnData with a row per gene, or gene and group, with their names and the number of cells in `obs`; without
    pooling a row per gene of a cell, with `cell` (its name), `cell_index` and `gene` in `obs`. The vectors are in
    `obsm['embeddings']` (rows, D), float32.

    Raises
    ------
    TranscriptFormerError
        If the data cannot be used; it says why.
    """
    if LLH_KEY in model.config.model.inference_config.output_keys:
        logger.warning("gene_embeddings leaves out llh, which is of cells: embed returns it")
    result = embed_sources(_files(data), _with(model, "cge", layer, use_raw, gene_col_name, pool))
    return result if pool is not None else to_rows_of_genes(result)


def _check_settings(settings: Mapping[str, object], arguments: Mapping[str, object]) -> None:
    """Raise UsageError for settings that would be ignored, or that contradict an argument of `load`."""
    for name in _DECIDED_BY_CALLS:
        key = _INFERENCE + name
        default = InferenceConfig.__dataclass_fields__[name].default
        if settings.get(key, default) not in (default, None):
            raise UsageError(
                f"settings: {key} has no effect here: embed and gene_embeddings say what is computed, and return it"
            )
    defaults = load.__kwdefaults__ or {}
    for key, value in arguments.items():
        name = key.removeprefix(_INFERENCE)
        default = list(defaults[name]) if name == "pretrained_embedding" else defaults[name]
        if key in settings and value not in (default, settings[key]):
            raise UsageError(f"{name}: given twice, as an argument ({value}) and in settings ({settings[key]})")


def _check_key(key: str) -> None:
    """Raise UsageError for a key that h5ad files and zarr stores cannot hold."""
    if not isinstance(key, str) or not key.strip(".") or "/" in key:
        raise UsageError(f"key_added={key!r}: a name without '/' is needed")


def _target(data: anndata.AnnData, copy: bool) -> anndata.AnnData:
    """The AnnData that takes the embeddings: made before they are computed, for it may not fit into memory."""
    if copy:
        return data.to_memory(copy=True) if data.isbacked else data.copy()
    if data.isbacked and data.is_view:
        raise UsageError("a view of a backed AnnData cannot take embeddings: give copy=True, or embed data.to_memory()")
    return data


def _files(data: anndata.AnnData | FileOrFiles) -> Source | list[Source]:
    if isinstance(data, anndata.AnnData | str | Path):
        return data
    if not isinstance(data, Iterable):
        raise UsageError(f"data is a {type(data).__name__}: an AnnData, a path or a list of paths is needed")
    sources = list(data)
    for source in sources:
        if not isinstance(source, anndata.AnnData | str | os.PathLike):
            raise UsageError(f"data holds a {type(source).__name__}: an AnnData, a path or a list of paths is needed")
    return sources


def _with(
    model: Checkpoint,
    emb_type: str,
    layer: str | None,
    use_raw: bool | None,
    gene_col_name: str | None,
    pool: str | None = None,
) -> Checkpoint:
    """The same model with what this call asks for."""
    settings = model.config.model
    data = settings.data_config
    if layer is not None or use_raw is not None:  # where the counts are, whatever the settings say
        data = replace(data, layer=layer, use_raw=use_raw)
    if gene_col_name is not None:
        data = replace(data, gene_col_name=gene_col_name)
    output_keys = settings.inference_config.output_keys if emb_type == "cell" else [EMBEDDINGS_KEY]
    if EMBEDDINGS_KEY not in output_keys:
        output_keys = [EMBEDDINGS_KEY, *output_keys]
    inference = replace(settings.inference_config, emb_type=emb_type, cge_pool=pool, output_keys=output_keys)
    section = replace(settings, data_config=data, inference_config=inference)
    return replace(model, config=replace(model.config, model=section))
