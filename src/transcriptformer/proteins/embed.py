"""Embed the proteins in a FASTA file and write one embedding per gene."""

import errno
import hashlib
import json
import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

from transcriptformer.checkpoint.vocabs import read_protein_embeddings, write_protein_embeddings
from transcriptformer.config import PRECISIONS
from transcriptformer.data.batches import BatchLimits, group_by_length
from transcriptformer.data.fingerprint import identify_file
from transcriptformer.errors import OutputError, UsageError, one_line
from transcriptformer.proteins.esm2 import PUBLISHED, choose_layer, find_model, read_config, weight_files
from transcriptformer.proteins.fasta import GENE, read_proteins
from transcriptformer.proteins.isoforms import FIRST, ISOFORMS, Proteome, choose_isoforms
from transcriptformer.proteins.workers import EMBEDDINGS, Batch, Job, embed_batches, share_batches
from transcriptformer.runtime.device import choose_device, compute_dtype, count_devices
from transcriptformer.runtime.signals import RESUME, report_kept
from transcriptformer.runtime.watchdog import Watchdog
from transcriptformer.storage.atomic import atomic_write, check_free_space, check_writable
from transcriptformer.storage.hdf5 import new_hdf5
from transcriptformer.storage.results import Pieces, open_pieces, verified_pieces
from transcriptformer.storage.workspace import Workspace, is_same_run

logger = logging.getLogger(__name__)

MAX_LENGTH = 1022
"""Default number of residues at which proteins are truncated; ESM-2 was trained on up to 1,024 tokens."""

TOKENS_PER_BATCH = {"cpu": 2**12, "mps": 2**14, "cuda": 2**14}
"""Default number of tokens per batch, by device."""

PROVENANCE = "transcriptformer"
"""Attribute of the result that records, as JSON, how it was made."""


@dataclass(frozen=True)
class Settings:
    """Settings of `embed_proteins`.

    Attributes
    ----------
    model
        Folder, or name on the Hugging Face hub.
    layer
        Layer whose hidden states are used, counted from 1; None: see `choose_layer`.
    id_from
        How to find gene ids in headers; see `read_proteins`.
    isoforms
        Proteins that represent a gene; see `choose_isoforms`.
    max_length
        Number of residues at which proteins are truncated.
    tokens_per_batch
        Maximum tokens per batch, padding included; None: depends on the device.
    device, precision, num_gpus
        As for `inference`.
    resume
        Continue an interrupted run.
    """

    model: str = PUBLISHED
    layer: int | None = None
    id_from: str = GENE
    isoforms: str = FIRST
    max_length: int = MAX_LENGTH
    tokens_per_batch: int | None = None
    device: str = "auto"
    precision: str = "32"
    num_gpus: int = 1
    resume: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"--precision {self.precision}: not one of {', '.join(PRECISIONS)}")
        if self.isoforms not in ISOFORMS:
            raise UsageError(f"--isoforms {self.isoforms}: not one of {', '.join(ISOFORMS)}")
        if self.num_gpus != -1 and self.num_gpus < 1:
            raise UsageError(f"--num-gpus {self.num_gpus}: must be at least 1, or -1 for all")


class Summary(NamedTuple):
    """The outcome of a run.

    Attributes
    ----------
    n_genes, width
        Shape of the result.
    n_proteins, n_cut, n_replaced
        Number of chosen proteins, of truncated ones, and of letters that became `<unk>`.
    n_sequences, n_computed
        Number of unique sequences, and of those that this run computed.
    seconds
        Duration of the run.
    """

    n_genes: int
    width: int
    n_proteins: int
    n_cut: int
    n_replaced: int
    n_sequences: int
    n_computed: int
    seconds: float


class Similarities(NamedTuple):
    """Cosine similarities between two files, over the genes they share."""

    n_shared: int
    minimum: float
    median: float
    mean: float


def result_path(fasta: Path, output_dir: Path) -> Path:
    """Return `<species>_gene.h5`, where the species is the file's name up to the first dot, in lower case."""
    return output_dir / f"{fasta.name.partition('.')[0].lower()}_gene.h5"


def embed_proteins(
    fasta: Path, output: Path, settings: Settings, on_progress: Callable[[int, int], object] = lambda done, total: None
) -> Summary:
    """Embed the proteins in a FASTA file and write one embedding per gene, in one or several processes.

    Intermediate results are kept in a folder next to the output until the run is complete.

    Parameters
    ----------
    on_progress
        Called with the number of sequences done and the total.

    Raises
    ------
    TranscriptFormerError
        If the FASTA file, the model or an option is invalid, or the output cannot be written. The output file appears
        only when it is complete.
    """
    started = time.monotonic()
    proteome = choose_isoforms(read_proteins(fasta, settings.id_from), settings.isoforms, settings.max_length)
    check_writable(output, "--output-dir")
    if output.exists() and not settings.resume:
        logger.info("%s exists, and is replaced when the new result is complete", output)
    device = choose_device(settings.device)
    devices = _devices(device, count_devices(device, settings.num_gpus))
    folder = find_model(settings.model)
    config = read_config(folder)
    layer = choose_layer(config, settings.layer)
    workspace = Workspace(output)
    identity = _identify(fasta, proteome, settings, folder, layer, device)
    n_computed = 0
    with Watchdog(), workspace.locked(settings.resume):
        if settings.resume and not workspace.exists and _is_complete(output, identity):
            logger.info("%s is already complete", output)
        else:
            if not workspace.can_resume(identity):
                with workspace.create(identity):
                    pass
            job = Job(folder, layer, settings.precision, workspace.folder, workspace.run_id, config.hidden_size)
            try:
                n_computed = _compute(proteome, job, settings, devices, on_progress)
                _write(output, proteome, job, identity)
                workspace.remove()
            except BaseException as error:
                report_kept(error, _describe_kept(workspace, job, len(proteome.sequences)))
                raise
    return Summary(
        len(proteome.genes),
        config.hidden_size,
        proteome.n_proteins,
        proteome.n_cut,
        proteome.n_replaced,
        len(proteome.sequences),
        n_computed,
        time.monotonic() - started,
    )


def plan_batches(proteome: Proteome, tokens_per_batch: int, max_length: int) -> list[Batch]:
    """Batch sequences of similar length, longest first: little padding, and memory errors come early."""
    lengths = np.array([len(residues) for residues in proteome.sequences])
    limits = BatchLimits(len(lengths), tokens_per_batch)
    # Every protein gets a start and an end token; `group_by_length` adds one of the two.
    groups = group_by_length(lengths + 1, limits, max_length + 2)
    return [Batch(rows, [proteome.sequences[row] for row in rows]) for rows in groups]


def compare(path: Path, other: Path) -> Similarities:
    """Compare the embeddings of the genes that two files share.

    Raises
    ------
    CheckpointError
        If a file cannot be read.
    UsageError
        If the files share no gene, or the widths of their embeddings differ.
    """
    (genes, ours), (other_genes, theirs) = read_protein_embeddings([path]), read_protein_embeddings([other])
    index = {gene: i for i, gene in enumerate(other_genes)}
    shared = [gene for gene in genes if gene in index]
    if not shared:
        raise UsageError(f"--compare {other}: no genes in common; ids look like {other_genes[0]}, not {genes[0]}")
    if ours.shape[1] != theirs.shape[1]:
        raise UsageError(f"--compare {other}: embeddings have width {theirs.shape[1]}, but {path} has {ours.shape[1]}")
    is_shared = np.array([gene in index for gene in genes])
    a, b = ours[is_shared].astype(np.float64), theirs[[index[gene] for gene in shared]].astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return Similarities(len(shared), float(cosines.min()), float(np.median(cosines)), float(cosines.mean()))


def _devices(device: torch.device, n: int) -> list[torch.device]:
    return [torch.device(device.type, i) if device.type == "cuda" else device for i in range(n)]


def _identify(
    fasta: Path, proteome: Proteome, settings: Settings, folder: Path, layer: int, device: torch.device
) -> dict[str, Any]:
    """Return everything that determines the result of a run."""
    proteins = hashlib.sha256("\n".join(proteome.sequences).encode())
    proteins.update("\n".join(proteome.genes).encode())
    for indices in (proteome.gene_of_protein, proteome.sequence_of_protein):
        proteins.update(indices.astype("<i8").tobytes())
    return {
        "fasta": fasta.name,
        "proteins": proteins.hexdigest(),
        "model": {
            "name": folder.resolve().name if Path(settings.model).is_dir() else settings.model,
            "files": [identify_file(path) for path in (folder / "config.json", *weight_files(folder))],
            "layer": layer,
        },
        "settings": {
            "id_from": settings.id_from,
            "isoforms": settings.isoforms,
            "max_length": settings.max_length,
            "type of matrix products": str(compute_dtype(settings.precision, device)),
        },
    }


def _is_complete(output: Path, identity: dict[str, Any]) -> bool:
    """Whether an identical run has written the output.

    Raises
    ------
    OutputError
        If it cannot be read, such as because another program has it open.
    """
    try:
        with h5py.File(output) as file:
            made = json.loads(file.attrs[PROVENANCE])
        return is_same_run(made["run"], identity)
    except OSError as error:
        if error.errno not in (None, errno.ENOENT):
            raise OutputError(f"{output}: cannot be read ({one_line(error)})") from error
        return False
    except (KeyError, TypeError, ValueError):
        return False


def _compute(
    proteome: Proteome,
    job: Job,
    settings: Settings,
    devices: list[torch.device],
    on_progress: Callable[[int, int], object],
) -> int:
    """Embed every sequence without a result, and return their number."""
    total = len(proteome.sequences)
    is_done = Pieces(verified_pieces(job.pieces, job.run), job.layout).is_done(total)
    tokens_per_batch = settings.tokens_per_batch or TOKENS_PER_BATCH[devices[0].type]
    batches = plan_batches(proteome, tokens_per_batch, settings.max_length)
    batches = [batch for batch in batches if not is_done[batch.rows].all()]
    before = total - sum(len(batch.rows) for batch in batches)
    if before:
        logger.info("%d of %d sequences are already done", before, total)
    on_progress(0, total - before)
    n_computed = 0
    if batches:
        devices = devices[: len(batches)]
        work = embed_batches(batches, job, devices[0]) if len(devices) == 1 else share_batches(batches, job, devices)
        with closing(work):
            for n in work:
                n_computed += n
                on_progress(n_computed, total - before)
    return n_computed


def _write(output: Path, proteome: Proteome, job: Job, identity: dict[str, Any]) -> None:
    pieces, total = Pieces(verified_pieces(job.pieces, job.run), job.layout), len(proteome.sequences)
    n_missing = total - len(pieces.rows)
    if n_missing:
        raise OutputError(f"{job.pieces}: {n_missing} of {total} sequences are missing; {RESUME}")
    check_free_space(output, len(proteome.genes) * job.width * 4)
    embeddings = proteome.gene_means(pieces.read(EMBEDDINGS, 0, total))
    with atomic_write(output) as temporary, new_hdf5(temporary) as file:
        write_protein_embeddings(file, proteome.genes, embeddings)
        file.attrs[PROVENANCE] = json.dumps({"version": version("transcriptformer"), "run": identity})


def _describe_kept(workspace: Workspace, job: Job, total: int) -> str | None:
    """Describe the intermediate results of an interrupted run; remove a workspace without any."""
    try:
        n_done = len(Pieces(open_pieces(job.pieces), job.layout).rows)
    except OutputError as error:
        logger.warning("%s", error)
        return None
    if n_done == 0:
        workspace.remove()
        return None
    return f"{n_done} of {total} sequences are kept in {workspace.folder}; {RESUME}"
