"""Part of the Python API: `transcriptformer.load`, `.embed`, `.gene_embeddings`, `.score` and `.perturb`."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd

from transcriptformer.checkpoint.load import Checkpoint, load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.config import InferenceConfig
from transcriptformer.errors import UsageError
from transcriptformer.generation.effects import SHIFT_KEY
from transcriptformer.generation.perturb import Perturb
from transcriptformer.generation.score import Score
from transcriptformer.inference.embeddings import EMBEDDINGS_KEY, LLH_KEY, Embeddings, to_gene_rows
from transcriptformer.inference.run import embed as embed_sources
from transcriptformer.runs.recording import MemoryRecorder
from transcriptformer.runs.run import Source, compute, run_in_memory, survey_sources
from transcriptformer.runs.task import Task

logger = logging.getLogger(__name__)

FileOrFiles = str | Path | Sequence[str | Path]

SCORE_KEY = "transcriptformer_score"
"""Key of `uns` for the provenance of scores."""

PERTURB_KEY = "transcriptformer_perturb"
"""Key of `uns` for the provenance of perturbations."""

_INFERENCE = "model.inference_config."

_UNSUPPORTED_SETTINGS = ("emb_type", "cge_pool", "output_path", "output_filename", "resume", "num_gpus", "num_nodes")
"""Command-line settings that have no effect on API calls."""


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
        Checkpoint folder, with `config.json`, `model_weights.pt` and `vocabs/`.
    device
        cpu, cuda, mps or auto (the first available of cuda, mps, cpu).
    precision
        32, bf16-mixed or 16-mixed (fp16 on GPUs; bf16 on CPUs with bf16 matrix instructions, else 32).
    batch_size
        Maximum cells per batch; auto: chosen for the device and its free memory.
    pretrained_embedding
        Protein-embedding files of a species the checkpoint was not trained on.
    settings
        Other settings by configuration path, such as `{"model.data_config.clip_counts": 50}`. Settings that contradict
        an argument, or that only apply to the `inference` command (such as `output_path`), raise an error.

    Returns
    -------
    The model, which the other functions take.

    Raises
    ------
    TranscriptFormerError
        If the checkpoint is incomplete or damaged, or a setting is invalid.

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
    return load_checkpoint(path, load_config(path, {**arguments, **settings}))


def embed(
    data: anndata.AnnData | FileOrFiles,
    model: Checkpoint,
    *,
    key_added: str = "X_transcriptformer",
    layer: str | None = None,
    use_raw: bool | str | None = None,
    gene_col_name: str | None = None,
    copy: bool = False,
) -> anndata.AnnData | None:
    """Embed cells.

    Parameters
    ----------
    data
        AnnData (in memory, backed or a view), or paths of one or more h5ad files or zarr stores. Counts are not
        modified.
    model
        Checkpoint returned by `load`.
    key_added
        Key of `obsm` for the embeddings; an existing entry is overwritten.
    layer
        Layer with the counts; None: use the model's settings, by default no layer.
    use_raw
        Use counts from `.raw` (True), `.X` (False) or `.raw` if present ("published"); None: use the model's settings,
        by default the first of `.raw.X`, `.X` and layers named like counts that holds whole numbers.
    gene_col_name
        Column of `var` with gene ids or symbols, or `index`; None: use the model's settings, by default the one that
        covers most genes of the vocabulary.
    copy
        Return a copy with the embeddings instead of modifying `data`. The copy of a backed AnnData is in memory. For
        files, a new AnnData is always returned.

    Returns
    -------
    For an AnnData, None, or the copy if `copy=True`. It contains `obsm[key_added]` (cells, D), float32, with NaN for
    cells removed by filters; `obs[key_added + '_llh']` if the model's settings request llh; `obs['predicted_…']` and
    its probability if the model has a label head; and the provenance in `uns[key_added]`. For files, a new AnnData of
    the kept cells and their metadata (columns selected by the setting `obs_keys`), with `uns['llh']` if requested and
    the provenance in `uns['transcriptformer']`.

    Raises
    ------
    TranscriptFormerError
        If the data cannot be used.
    """
    _check_key(key_added)
    model = _with_call_settings(model, "cell", layer, use_raw, gene_col_name)
    if not isinstance(data, anndata.AnnData):
        result = embed_sources(_to_sources(data), model)
        result.obsm[key_added] = result.obsm.pop(EMBEDDINGS_KEY)
        return result
    if model.config.model.inference_config.make_names_unique:
        logger.warning("the names of an AnnData stay as they are; make_names_unique only applies to files")
    found = _compute_for(data, Embeddings(model), copy)
    found.target.obsm[key_added] = found.all_rows(EMBEDDINGS_KEY)
    if LLH_KEY in found.results.layout:
        found.target.obs[f"{key_added}_llh"] = found.all_rows(LLH_KEY)
    found.add_columns()
    found.target.uns[key_added] = found.provenance
    return found.target if copy else None


def gene_embeddings(
    data: anndata.AnnData | FileOrFiles,
    model: Checkpoint,
    *,
    pool: str | None = "gene",
    layer: str | None = None,
    use_raw: bool | str | None = None,
    gene_col_name: str | None = None,
) -> anndata.AnnData:
    """Compute contextual gene embeddings: each gene's state given the genes before it in the cell.

    Parameters
    ----------
    data, model, layer, use_raw, gene_col_name
        As for `embed`.
    pool
        gene: average over cells per gene; a column of `obs`: average per gene and value of that column; None: one
        vector per gene and cell, which takes (total genes of all cells) × D × 8 bytes of memory.

    Returns
    -------
    An AnnData with one row per gene, or per gene and group; `obs` holds their names and the number of cells. Without
    pooling, one row per gene and cell, with `cell` (its name), `cell_index` and `gene` in `obs`. The vectors are in
    `obsm['embeddings']` (rows, D), float32.

    Raises
    ------
    TranscriptFormerError
        If the data cannot be used.
    """
    if LLH_KEY in model.config.model.inference_config.output_keys:
        logger.warning("gene_embeddings ignores the output key llh; use embed for it")
    result = embed_sources(_to_sources(data), _with_call_settings(model, "cge", layer, use_raw, gene_col_name, pool))
    return result if pool is not None else to_gene_rows(result)


def score(
    data: anndata.AnnData | FileOrFiles,
    model: Checkpoint,
    *,
    orders: int = 1,
    per_gene: str | None = None,
    seed: int = 0,
    layer: str | None = None,
    use_raw: bool | str | None = None,
    gene_col_name: str | None = None,
    copy: bool = False,
) -> anndata.AnnData | None:
    """Score how likely the model finds the genes and counts of cells.

    Parameters
    ----------
    data, model, layer, use_raw, gene_col_name
        As for `embed`.
    orders
        Number of random orders of each cell's genes that likelihoods are averaged over; 0: the order of the data.
    per_gene
        None: one score per cell; gene: averages per gene; a column of `obs`: averages per gene and value of it.
    seed
        Seed of the orders.
    copy
        Return a copy with the scores instead of modifying `data`.

    Returns
    -------
    For an AnnData, None, or the copy if `copy=True`. Its `obs` gets `gene_nll` and `count_nll`, the mean negative
    log-likelihoods in nats of a cell's genes and of their counts, `perplexity`, which is exp(gene_nll), and for several
    orders the standard errors `gene_nll_se` and `count_nll_se`; NaN for cells removed by filters or without genes. For
    files, a new AnnData; with `per_gene`, one with a row per gene, or per gene and group.

    Raises
    ------
    TranscriptFormerError
        If the data cannot be used, or the model has no gene head for its genes.
    """
    task = Score(_with_call_settings(model, "cell", layer, use_raw, gene_col_name), orders, per_gene, seed)
    if per_gene is not None or not isinstance(data, anndata.AnnData):
        return run_in_memory(_to_sources(data), task)
    found = _compute_for(data, task, copy)
    obs = found.target.obs
    found.target.obs = obs.drop(columns=[name for name in task.columns if name in obs])
    found.add_columns()
    found.target.uns[SCORE_KEY] = found.provenance
    return found.target if copy else None


def perturb(
    data: anndata.AnnData | FileOrFiles,
    model: Checkpoint,
    *,
    knock_out: Sequence[str] = (),
    set_counts: Mapping[str, float] | None = None,
    at: str = "end",
    groupby: str | None = None,
    null: int = 0,
    seed: int = 0,
    layer: str | None = None,
    use_raw: bool | str | None = None,
    gene_col_name: str | None = None,
    copy: bool = False,
) -> anndata.AnnData | None:
    """Measure how far changes of single genes move the embeddings of cells.

    Parameters
    ----------
    data, model, layer, use_raw, gene_col_name
        As for `embed`.
    knock_out
        Genes, by id or symbol, each removed alone.
    set_counts
        Genes with the counts that each gets alone; an absent gene is added.
    at
        Where it is added: end (the last position that the model reads) or start.
    groupby
        Column of `obs`, for whose values effects are summarized.
    null
        Number of genes of like expression whose changes each perturbation is compared with; 0: none.
    seed
        Seed of these genes and of the bootstrap.
    copy
        Return a copy with the results instead of modifying `data`.

    Returns
    -------
    For an AnnData, None, or the copy if `copy=True`. Its `obsm['cosine_shift']` (cells, perturbations), float32, is
    1 − cos of the embeddings before and after; NaN for cells removed by filters, and where a gene that the cell does
    not express, or its only one, is knocked out. `uns['perturbations']` has the names, and
    `uns['perturbation_table']` the effects on all cells and each group. With a label head,
    `uns['perturbation_labels']` has the mean change of each label's probability. For files, a new AnnData.

    Raises
    ------
    TranscriptFormerError
        If the data cannot be used, or a gene, count or option is invalid.

    Examples
    --------
    >>> import transcriptformer as tf
    >>> model = tf.load("checkpoints/tf_sapiens")
    >>> tf.perturb(adata, model, knock_out=["CD79A", "MS4A1"], groupby="cell_type", null=100)
    >>> adata.uns["perturbation_table"]
    """
    model = _with_call_settings(model, "cell", layer, use_raw, gene_col_name)
    task = Perturb(model, knock_out, set_counts or {}, at, groupby, null, seed)
    if not isinstance(data, anndata.AnnData):
        return run_in_memory(_to_sources(data), task)
    found = _compute_for(data, task, copy)
    found.target.obsm[SHIFT_KEY] = found.all_rows(SHIFT_KEY)
    found.target.uns.update(task.unstructured(found.results))
    found.target.uns[PERTURB_KEY] = found.provenance
    return found.target if copy else None


class _Found(NamedTuple):
    """Results of a task on the kept cells of an AnnData, to be added to `target`."""

    target: anndata.AnnData
    task: Task
    results: MemoryRecorder
    kept: np.ndarray
    provenance: dict[str, object]

    def all_rows(self, name: str) -> np.ndarray:
        """Return a field of all cells (cells, …), float32, NaN for cells removed by filters."""
        rows = np.full((len(self.kept), *self.results.layout[name].shape), np.nan, np.float32)
        rows[self.kept] = self.results.read(name, 0, int(self.kept.sum()))
        return rows

    def add_columns(self) -> None:
        """Add the task's columns to `obs`; the values of cells removed by filters are missing."""
        for name, values in self.task.values_of_columns(self.results, 0, int(self.kept.sum())).items():
            of_all = pd.Series(values, index=np.flatnonzero(self.kept)).reindex(range(len(self.kept)))
            self.target.obs[name] = of_all.array


def _compute_for(data: anndata.AnnData, task: Task, copy: bool) -> _Found:
    """Compute a task on the cells of an AnnData, for this or a copy of it."""
    target = _output_adata(data, copy)
    cells = survey_sources(data, task)
    computed = compute(cells, task)
    assert isinstance(computed.results, MemoryRecorder)
    return _Found(target, task, computed.results, cells.survey.kept, computed.provenance)


def _check_settings(settings: Mapping[str, object], arguments: Mapping[str, object]) -> None:
    """Raise UsageError for settings that have no effect or contradict an argument of `load`."""
    for name in _UNSUPPORTED_SETTINGS:
        key = _INFERENCE + name
        default = InferenceConfig.__dataclass_fields__[name].default
        if settings.get(key, default) not in (default, None):
            raise UsageError(f"settings: {key} has no effect in the Python API; use arguments of the function you call")
    defaults = load.__kwdefaults__ or {}
    for key, value in arguments.items():
        name = key.removeprefix(_INFERENCE)
        default = list(defaults[name]) if name == "pretrained_embedding" else defaults[name]
        if key in settings and value not in (default, settings[key]):
            raise UsageError(
                f"{name}: conflicting values, argument {value} and settings {settings[key]}; give one of them"
            )


def _check_key(key: str) -> None:
    """Raise UsageError for a key that h5ad files and zarr stores cannot hold."""
    if not isinstance(key, str) or not key.strip(".") or "/" in key:
        raise UsageError(f"key_added={key!r}: must be a name without '/'")


def _output_adata(data: anndata.AnnData, copy: bool) -> anndata.AnnData:
    """AnnData to add the embeddings to; a copy is made first, so that lack of memory shows before computing."""
    if copy:
        return data.to_memory(copy=True) if data.isbacked else data.copy()
    if data.isbacked and data.is_view:
        raise UsageError(
            "data is a view of a backed AnnData, which cannot be modified; use copy=True, or embed data.to_memory()"
        )
    return data


def _to_sources(data: anndata.AnnData | FileOrFiles) -> Source | list[Source]:
    if isinstance(data, anndata.AnnData | str | Path):
        return data
    if not isinstance(data, Iterable):
        raise UsageError(f"data is a {type(data).__name__}: must be an AnnData, a path or a list of paths")
    sources = list(data)
    for source in sources:
        if not isinstance(source, anndata.AnnData | str | os.PathLike):
            raise UsageError(f"data contains a {type(source).__name__}: must be an AnnData, a path or a list of paths")
    return sources


def _with_call_settings(
    model: Checkpoint,
    emb_type: str,
    layer: str | None,
    use_raw: bool | str | None,
    gene_col_name: str | None,
    pool: str | None = None,
) -> Checkpoint:
    """Copy of the model with the settings of a call."""
    settings = model.config.model
    data = settings.data_config
    if layer is not None or use_raw is not None:  # both, so that a call overrides either setting
        data = replace(data, layer=layer, use_raw=use_raw)
    if gene_col_name is not None:
        data = replace(data, gene_col_name=gene_col_name)
    output_keys = settings.inference_config.output_keys if emb_type == "cell" else [EMBEDDINGS_KEY]
    if EMBEDDINGS_KEY not in output_keys:
        output_keys = [EMBEDDINGS_KEY, *output_keys]
    inference = replace(settings.inference_config, emb_type=emb_type, cge_pool=pool, output_keys=output_keys)
    section = replace(settings, data_config=data, inference_config=inference)
    return replace(model, config=replace(model.config, model=section))
