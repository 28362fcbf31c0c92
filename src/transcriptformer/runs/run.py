"""Run a task on the cells of inputs: in memory, or from files to a file."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
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
from transcriptformer.data.store import Location, find_files
from transcriptformer.data.survey import Survey, survey_cells
from transcriptformer.errors import CheckpointError, UsageError
from transcriptformer.runs.batch_size import batch_limits
from transcriptformer.runs.file_run import FileRun
from transcriptformer.runs.inputs import Inputs
from transcriptformer.runs.output import pooled_to_anndata, provenance_of, read_provenance, to_anndata
from transcriptformer.runs.pooling import Pool, new_pool
from transcriptformer.runs.recording import MemoryRecorder, OnProgress, Recording
from transcriptformer.runs.task import CellModule, Task
from transcriptformer.runtime.memory import keep_freed_memory
from transcriptformer.runtime.processes import plan_processes, translated_failures
from transcriptformer.runtime.signals import report_kept
from transcriptformer.storage.atomic import check_writable, refuse_overwriting
from transcriptformer.storage.workspace import Workspace, is_same_run

logger = logging.getLogger(__name__)

Source: TypeAlias = str | Path | anndata.AnnData


class SurveyedCells(NamedTuple):
    """Opened sources and the survey of their cells."""

    sources: list[Path | str | anndata.AnnData]
    inputs: Inputs
    survey: Survey


def survey_sources(sources: Source | Sequence[Source], task: Task) -> SurveyedCells:
    """Open sources and survey their cells.

    Parameters
    ----------
    sources
        h5ad file, zarr store or AnnData object, or a list of these; not modified.

    Raises
    ------
    TranscriptFormerError
        If a source cannot be used, or an option does not apply to it.
    """
    source_list = _as_list(sources)
    inputs = Inputs(source_list, task)
    survey = survey_cells(inputs.readers, task.checkpoint.config.model.data_config)
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


def compute(cells: SurveyedCells, task: Task, on_progress: OnProgress | None = None) -> Computed:
    """Compute the results of a task on one device and in memory.

    Parameters
    ----------
    on_progress
        Called before the first batch and after each batch.
    """
    sources, inputs, survey = cells
    checkpoint = task.checkpoint
    results: MemoryRecorder | Pool
    if task.pool is None:
        groups = pd.Index([])
        results = MemoryRecorder(task.layout, survey.n_kept)
    else:
        group_of_row, groups = inputs.groups(survey)
        results = new_pool(task, group_of_row)
    recording = Recording(results, task.layout, survey.lengths[survey.kept], on_progress=on_progress)
    task.prepare(inputs, survey)
    limits = task.limit_batches(batch_limits(checkpoint))
    loader = inputs.loader(survey, limits, 0, 1, np.zeros(survey.n_kept, bool))
    try:
        with ThreadPoolExecutor(1) as background, translated_failures():
            sha256 = background.submit(checkpoint.weights_sha256)
            predict(task.make_module(), loader, recording, checkpoint.device)
    finally:
        inputs.close()
    return Computed(results, groups, provenance_of(sources, checkpoint, _sha256_or_unknown(sha256), inputs.inferred()))


def run_in_memory(
    sources: Source | Sequence[Source], task: Task, on_progress: OnProgress | None = None
) -> anndata.AnnData:
    """Run a task on the cells of one or more sources, in order, on one device and in memory.

    Parameters
    ----------
    sources
        As for `survey_sources`.
    on_progress
        As for `compute`.

    Returns
    -------
    An AnnData with the cells that passed the filters, their `obs`, the task's results, and the provenance in
    `uns['transcriptformer']`; if they are pooled, with one row per gene, or per gene and group.

    Raises
    ------
    TranscriptFormerError
        If a source cannot be used, or an option does not apply to it.
    """
    cells = survey_sources(sources, task)
    obs = None if task.pool is not None else cells.inputs.obs(cells.survey)  # first, as it may be damaged
    computed = compute(cells, task, on_progress)
    if isinstance(computed.results, Pool):
        names = task.checkpoint.gene_vocab.names()
        table, means = computed.results.table(names, computed.groups, cells.inputs.group_column)
        return pooled_to_anndata(task, table, means, computed.provenance)
    assert obs is not None
    return to_anndata(obs, task, computed.results, computed.provenance)


def _sha256_or_unknown(sha256: Future[str]) -> str:
    """Return the hash of the weights; without the file, the results are still worth keeping."""
    try:
        return sha256.result()
    except CheckpointError as error:
        logger.warning("%s; the provenance lacks the hash of the weights", error)
        return "unknown"


def run_on_files(
    names: Sequence[Location],
    checkpoint_path: Path,
    config: Config,
    make_task: Callable[[Checkpoint], Task],
    on_progress: OnProgress | None = None,
) -> Path | None:
    """Run a task on the cells of files or stores and write one file or store.

    Intermediate results are kept in a folder next to the output. The run may use several processes.

    Parameters
    ----------
    names
        Paths or URLs of the inputs, in order; paths may contain wildcards.
    make_task
        Returns the task for the loaded checkpoint.

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
    refuse_overwriting(output, locations, "--output-filename")
    checkpoint = load_checkpoint(checkpoint_path, config)
    task = make_task(checkpoint)
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
        file_run = FileRun(locations, task, workspace, sha256.result, processes)
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
                predict(task.make_module(), file_run.batches(), recording, device)
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
        raise UsageError("no input; give at least one file or AnnData")
    return source_list


@torch.inference_mode()
def predict(module: CellModule, batches: BatchLoader, recording: Recording, device: torch.device) -> None:
    """Predict batches on a device, and record the results."""
    module.to(device).eval()
    module.prepare(batches.lengths, device)
    with recording:
        for batch in batches:
            recording.add(module(batch.to(device)))
