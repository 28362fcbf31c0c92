"""Run inference: in memory, or from files to a file."""

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import anndata
import numpy as np
import pandas as pd
import torch

from transcriptformer.checkpoint.load import Checkpoint, load_checkpoint
from transcriptformer.config import Config
from transcriptformer.data.batches import BatchLoader
from transcriptformer.data.store import Location, find_files, is_url
from transcriptformer.data.survey import Survey, survey_cells
from transcriptformer.errors import CheckpointError, UsageError
from transcriptformer.inference.batch_size import batch_limits
from transcriptformer.inference.file_run import FileRun
from transcriptformer.inference.inputs import Inputs
from transcriptformer.inference.module import EmbeddingModule, Esm2CEModule, TranscriptFormerModule
from transcriptformer.inference.output import pooled_to_anndata, provenance_of, read_provenance, to_anndata
from transcriptformer.inference.pooling import Pool
from transcriptformer.inference.recording import MemoryRecorder, OnProgress, Recording, layout_of
from transcriptformer.model.esm2ce import Esm2CE
from transcriptformer.runtime.memory import keep_freed_memory
from transcriptformer.runtime.processes import plan_processes, translated_failures
from transcriptformer.runtime.signals import report_kept
from transcriptformer.storage.atomic import check_writable
from transcriptformer.storage.workspace import Workspace, is_same_run

logger = logging.getLogger(__name__)

Source: TypeAlias = str | Path | anndata.AnnData


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
    cells = survey_sources(sources, checkpoint)
    is_pooled = checkpoint.config.model.inference_config.cge_pool is not None
    obs = None if is_pooled else cells.inputs.obs(cells.survey)  # first, as it may be damaged
    computed = compute(cells, checkpoint, on_progress)
    names, results = checkpoint.gene_vocab.names(), computed.results
    if isinstance(results, Pool):
        table, means = results.table(names, computed.groups, cells.inputs.group_column)
        return pooled_to_anndata(table, means, computed.provenance)
    assert obs is not None
    return to_anndata(obs, results, names, computed.provenance, checkpoint.label_head)


class SurveyedCells(NamedTuple):
    """Opened sources and the survey of their cells."""

    sources: list[Path | str | anndata.AnnData]
    inputs: Inputs
    survey: Survey


def survey_sources(sources: Source | Sequence[Source], checkpoint: Checkpoint) -> SurveyedCells:
    """Open sources and survey their cells; parameters and errors as for `embed`."""
    source_list = _as_list(sources)
    inputs = Inputs(source_list, checkpoint)
    survey = survey_cells(inputs.readers, checkpoint.config.model.data_config)
    inputs.log_summary(survey)
    return SurveyedCells(source_list, inputs, survey)


class Computed(NamedTuple):
    """In-memory results.

    Attributes
    ----------
    results
        Results of the kept cells, in order, or a pool.
    groups
        Names of the groups of a pool.
    provenance
        Provenance of the results.
    """

    results: MemoryRecorder | Pool
    groups: pd.Index
    provenance: dict[str, object]


def compute(cells: SurveyedCells, checkpoint: Checkpoint, on_progress: OnProgress | None = None) -> Computed:
    """Compute the results that `embed` converts to an AnnData."""
    sources, inputs, survey = cells
    inference = checkpoint.config.model.inference_config
    results: MemoryRecorder | Pool
    if inference.cge_pool is None:
        groups = pd.Index([])
        results = MemoryRecorder(
            layout_of(inference, checkpoint.width, checkpoint.label_head is not None), survey.n_kept
        )
    else:
        group_of_row, groups = inputs.groups(survey)
        results = Pool(group_of_row, len(checkpoint.gene_vocab), checkpoint.width)
    recording = Recording(results, survey.lengths[survey.kept], on_progress=on_progress)
    loader = inputs.loader(survey, batch_limits(checkpoint), 0, 1, np.zeros(survey.n_kept, bool))
    try:
        with ThreadPoolExecutor(1) as background, translated_failures():
            sha256 = background.submit(checkpoint.weights_sha256)
            predict(make_module(checkpoint), loader, recording, checkpoint.device)
    finally:
        inputs.close()
    return Computed(results, groups, provenance_of(sources, checkpoint, _sha256_or_unknown(sha256), inputs.inferred()))


def _sha256_or_unknown(sha256: Future[str]) -> str:
    """Return the hash of the weights; without the file, the results are still worth keeping."""
    try:
        return sha256.result()
    except CheckpointError as error:
        logger.warning("%s; the provenance lacks the hash of the weights", error)
        return "unknown"


def run(
    names: Sequence[Location], checkpoint_path: Path, config: Config, on_progress: OnProgress | None = None
) -> Path | None:
    """Run `transcriptformer inference`: embed the cells of files or stores and write one file or store.

    Intermediate results are kept in a folder next to the output. The run may use several processes.

    Parameters
    ----------
    names
        Paths or URLs of the inputs, in order; paths may contain wildcards.

    Returns
    -------
    Path of the output, in `output_path` of the configuration; None in processes that do not write it.

    Raises
    ------
    TranscriptFormerError
        If an input cannot be used, or the output cannot be written and is not created.
    """
    inference = config.model.inference_config
    locations = [location for name in names for location in find_files(name)]
    output = Path(inference.output_path) / inference.output_filename
    check_writable(output)
    if output.resolve() in [Path(location).resolve() for location in locations if not is_url(location)]:
        raise UsageError(
            f"--output-filename {output}: is also an input, which would be overwritten; choose another name"
        )
    checkpoint = load_checkpoint(checkpoint_path, config)
    if checkpoint.device.type == "cpu":
        keep_freed_memory()
    processes = plan_processes(inference, checkpoint.device)
    workspace, watchdog = Workspace(output), processes.watchdog()
    if not processes.is_first:  # log in one process only
        logging.getLogger("transcriptformer").setLevel(logging.ERROR)
    if output.exists() and not inference.resume:
        logger.info("%s exists, and is replaced when the new result is complete", output)
    with (
        watchdog,
        workspace.locked(inference.resume) if processes.is_first else nullcontext(),
        ThreadPoolExecutor(1) as background,
    ):
        sha256 = background.submit(checkpoint.weights_sha256)
        file_run = FileRun(locations, checkpoint, workspace, sha256.result, processes)
        if inference.resume and not workspace.exists and _is_complete(output, file_run.identity):
            logger.info("%s is already complete", output)
            if not processes.is_first:
                return None
            workspace.remove()  # possibly left behind by a killed process
            return output
        try:
            watchdog.watch_children(processes.launch())
            with translated_failures(), processes.connected(watchdog):
                if processes.is_first:
                    file_run.prepare()
                processes.barrier()
                file_run.load()
                recording, device = file_run.recording(on_progress, watchdog), processes.own_device(checkpoint.device)
                predict(make_module(checkpoint), file_run.batches(), recording, device)
                processes.barrier()
            if not processes.is_first:
                return None
            file_run.write()
        except BaseException as error:
            watchdog.fail(error)
            if processes.is_first:
                report_kept(error, file_run.describe_kept())
            raise
        finally:
            file_run.inputs.close()
    return output


def _is_complete(output: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the output was written by a run with the same identity."""
    provenance = read_provenance(output) if output.exists() else None
    return provenance is not None and "run" in provenance and is_same_run(json.loads(provenance["run"]), identity)


def _as_list(sources: Source | Sequence[Source]) -> list[Path | str | anndata.AnnData]:
    source_list = [sources] if isinstance(sources, str | Path | anndata.AnnData) else list(sources)
    if not source_list:
        raise UsageError("nothing to embed; give at least one file or AnnData")
    return source_list


def make_module(checkpoint: Checkpoint) -> EmbeddingModule:
    """Wrap the model of a checkpoint with what the run computes from it."""
    model, pad = checkpoint.config.model, checkpoint.gene_vocab.pad
    if isinstance(checkpoint.model, Esm2CE):
        return Esm2CEModule(checkpoint.model, model.inference_config, pad)
    clip_counts, label_head = model.data_config.clip_counts, checkpoint.label_head
    return TranscriptFormerModule(checkpoint.model, model.inference_config, clip_counts, pad, label_head)


@torch.inference_mode()
def predict(module: EmbeddingModule, batches: BatchLoader, recording: Recording, device: torch.device) -> None:
    """Predict batches on a device, and record the results."""
    module.to(device).eval()
    module.prepare(batches.lengths, device)
    with recording:
        for batch in batches:
            recording.add(module(batch.to(device)))
