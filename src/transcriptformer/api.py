"""The Python API; people find it as `transcriptformer.load`, `.embed` and `.gene_embeddings`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from transcriptformer.checkpoint import Checkpoint, load_checkpoint
from transcriptformer.config import load_config
from transcriptformer.data.source import looks_like_gene_ids
from transcriptformer.errors import UsageError
from transcriptformer.inference import Source, compute
from transcriptformer.inference import embed as embed_sources
from transcriptformer.output import EMBEDDINGS_KEY, predicted_labels, to_rows_of_genes
from transcriptformer.recording import MemoryRecorder

FileOrFiles = str | Path | Sequence[str | Path]


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
        Anything else, by the paths of the configuration, such as `{"model.data_config.clip_counts": 50}`.

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
    options: dict[str, object] = {
        "model.inference_config.device": device,
        "model.inference_config.precision": precision,
        "model.inference_config.batch_size": batch_size,
        "model.inference_config.pretrained_embedding": [str(file) for file in files],
        **(settings or {}),
    }
    path = Path(path)
    return load_checkpoint(path, load_config(path, options))


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
        Where the embeddings go in `obsm`.
    layer
        Take the counts from this layer of the AnnData.
    use_raw
        Take them from `.raw` (True), from `.X` (False), or from `.raw` where there is one (None).
    gene_col_name
        Column of `var` with Ensembl gene ids, or `index`; None: `ensembl_id` where there is such a column, else the
        index.
    copy
        Return a copy with the embeddings instead of adding them to `data`.

    Returns
    -------
    For an AnnData None, or the copy: `obsm[key_added]` (cells, D), float32, has a row for every cell, NaN for cells
    that the filters of the model's settings leave out; `obs[key_added + '_llh']` if the settings ask for llh; with
    a model that was trained to tell labels, `obs['predicted_…']` and its probability; `uns[key_added]` says how it was
    made. For files a new AnnData of the kept cells with their metadata.

    Raises
    ------
    TranscriptFormerError
        If the data cannot be used; it says why.
    """
    if not isinstance(data, anndata.AnnData):
        result = embed_sources(_files(data), _with(model, "cell", use_raw, gene_col_name))
        result.obsm[key_added] = result.obsm.pop(EMBEDDINGS_KEY)
        return result
    model = _with(model, "cell", use_raw, gene_col_name or _gene_column(data, layer, use_raw))
    computed = compute(data, model, layer=layer)
    assert isinstance(computed.results, MemoryRecorder)
    target = data.copy() if copy else data
    kept, n_kept = computed.survey.kept, computed.survey.n_kept
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
    if isinstance(data, anndata.AnnData):
        gene_col_name = gene_col_name or _gene_column(data, layer, use_raw)
    result = embed_sources(_files(data), _with(model, "cge", use_raw, gene_col_name, pool), layer=layer)
    return result if pool is not None else to_rows_of_genes(result)


def _files(data: anndata.AnnData | FileOrFiles) -> Source | list[Source]:
    return data if isinstance(data, anndata.AnnData | str | Path) else list(data)


def _with(
    model: Checkpoint, emb_type: str, use_raw: bool | None, gene_col_name: str | None, pool: str | None = None
) -> Checkpoint:
    """The same model with what this call asks for."""
    settings = model.config.model
    data = settings.data_config
    data = replace(
        data,
        use_raw=data.use_raw if use_raw is None else use_raw,
        gene_col_name=data.gene_col_name if gene_col_name is None else gene_col_name,
    )
    output_keys = settings.inference_config.output_keys if emb_type == "cell" else [EMBEDDINGS_KEY]
    if EMBEDDINGS_KEY not in output_keys:
        output_keys = [EMBEDDINGS_KEY, *output_keys]
    inference = replace(settings.inference_config, emb_type=emb_type, cge_pool=pool, output_keys=output_keys)
    section = replace(settings, data_config=data, inference_config=inference)
    return replace(model, config=replace(model.config, model=section))


def _gene_column(data: anndata.AnnData, layer: str | None, use_raw: bool | None) -> str | None:
    """The index, where it is the only place with gene ids; None: what the settings say."""
    if layer is not None and use_raw:
        raise UsageError("layer and use_raw=True: the counts can come from one of them only")
    from_raw = layer is None and use_raw is not False and data.raw is not None
    var = data.raw.var if from_raw else data.var
    return "index" if "ensembl_id" not in var.columns and looks_like_gene_ids(var.index) else None
