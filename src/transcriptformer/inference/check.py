"""`transcriptformer check`: validate inputs and estimate an inference run without computing embeddings."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from transcriptformer.checkpoint.load import Checkpoint, load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.config import DataConfig
from transcriptformer.data.batches import LENGTH_MULTIPLE, group_by_length, positions
from transcriptformer.data.formats import open_contents
from transcriptformer.data.gene_map import load_symbol_maps
from transcriptformer.data.joined import JoinedMetadata
from transcriptformer.data.reader import CellReader
from transcriptformer.data.source import CellSource, check_duplicates, source_of_contents
from transcriptformer.data.species import likely_species, looks_like_gene_ids
from transcriptformer.data.store import Location
from transcriptformer.data.survey import Survey, survey_cells
from transcriptformer.errors import TranscriptFormerError
from transcriptformer.inference.embeddings import Embeddings
from transcriptformer.model.esm2ce import Esm2CE
from transcriptformer.runs.batch_size import batch_limits, bytes_per_token
from transcriptformer.runs.inputs import Inputs, check_obs
from transcriptformer.runtime.device import compute_dtype
from transcriptformer.vocab import GeneVocab, make_gene_vocab

BASELINE_BYTES = 5 * 2**28
"""Memory of a process without weights and batches: Python, PyTorch and blocks of counts being read."""

NO_CHECKPOINT_SEQ_LEN = 2**31

TOGETHER = "together with the other files: "

SAMPLED_CELLS = 2048
"""Cells that tell how much repeated genes matter."""


@dataclass
class Report:
    """Findings about one file; None if unknown: without a checkpoint, or if the file cannot be read.

    Attributes
    ----------
    refused
        Error that `inference` would raise.
    counts_from, genes_from
        Where counts and gene ids are, and why they are taken from there.
    genes_known, genes_known_before
        Number of genes in the vocabulary, and of those known without mapping symbols.
    unknown_symbols, ambiguous_symbols
        Symbols that stand for no gene, and for several; both are left out.
    repeated_genes, repeated_examples, repeated_share
        Number of columns whose gene has an earlier column, some of these genes, and the share of their counts.
    warnings
        What `inference` would warn of, besides repeated genes and cell names.
    cells_too_long, unseen_share
        Number of truncated cells, with more genes than model positions, and the fraction of all counts this drops.
    unknown_values
        Values missing from the checkpoint's vocabulary and their number of cells, per auxiliary column.
    memory_gib, seconds
        Estimates for a run with the same options on this machine.
    """

    file: str
    refused: str | None = None
    cells: int | None = None
    cells_kept: int | None = None
    genes: int | None = None
    counts_from: str | None = None
    genes_from: str | None = None
    gene_ids: str | None = None
    species: str | None = None
    genes_known: int | None = None
    genes_known_before: int | None = None
    unknown_symbols: list[str] = field(default_factory=list)
    ambiguous_symbols: list[str] = field(default_factory=list)
    repeated_genes: int | None = None
    repeated_examples: list[str] = field(default_factory=list)
    repeated_share: float | None = None
    repeated_cell_names: int | None = None
    whole_numbers: bool | None = None
    mean_genes_per_cell: float | None = None
    cells_empty: int | None = None
    cells_too_long: int | None = None
    unseen_share: float | None = None
    unknown_values: dict[str, dict[str, int]] = field(default_factory=dict)
    memory_gib: float | None = None
    seconds: float | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary."""
        return asdict(self)


def check(
    locations: Sequence[Location],
    checkpoint_path: Path | None = None,
    options: Mapping[str, object] | None = None,
    overrides: Sequence[str] = (),
) -> list[Report]:
    """Validate files as `inference` does, and estimate memory and time.

    Parameters
    ----------
    locations
        h5ad files or zarr stores.
    checkpoint_path
        Checkpoint to use; None: check only the files themselves.
    options, overrides
        As for `transcriptformer.checkpoint.published.load_config`.

    Raises
    ------
    TranscriptFormerError
        If the checkpoint or an option is invalid. Errors in a file are in its report.
    """
    reports = [Report(str(location)) for location in locations]
    if checkpoint_path is None:
        data = {key.rpartition(".")[2]: value for key, value in (options or {}).items() if value is not None}
        known = {name: value for name, value in data.items() if name in DataConfig.__dataclass_fields__}
        standalone = DataConfig(**known)  # type: ignore[arg-type]
        for report, location in zip(reports, locations, strict=True):
            with _findings_in(report):
                _describe_alone(report, location, standalone)
        return reports
    config = load_config(checkpoint_path, options, overrides)
    checkpoint = load_checkpoint(checkpoint_path, config)
    seconds_per_flop = _seconds_per_flop(checkpoint)
    sources: list[CellSource] = []
    for report, location in zip(reports, locations, strict=True):
        with _findings_in(report):
            sources.append(_describe(report, location, checkpoint, seconds_per_flop))
    if len(sources) == len(locations) > 1:
        together = Report("")
        with _findings_in(together):
            Inputs(sources, Embeddings(checkpoint)).check_obs(_as_zarr(checkpoint))
        _add_to_each(reports, together)
    return reports


def _add_to_each(reports: Sequence[Report], together: Report) -> None:
    """Add findings about valid files together to the report of each."""
    known = {warning for report in reports for warning in report.warnings}
    warnings = [f"{TOGETHER}{warning}" for warning in together.warnings if warning not in known]
    for report in reports:
        report.refused = together.refused and f"{TOGETHER}{together.refused}"
        report.warnings += warnings


@contextmanager
def _findings_in(report: Report) -> Iterator[None]:
    """Put the error and the warnings of `inference` into a report, instead of raising and logging them."""
    ours = logging.getLogger("transcriptformer")
    before = ours.level, ours.handlers, ours.propagate
    ours.handlers, ours.propagate = [_Collector(report.warnings)], False
    ours.setLevel(logging.WARNING)
    try:
        yield
    except TranscriptFormerError as error:
        report.refused = str(error)
    finally:
        ours.setLevel(before[0])
        ours.handlers, ours.propagate = before[1:]


class _Collector(logging.Handler):
    """Handler that appends messages to a list, each once."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        if (message := record.getMessage()) not in self.messages:
            self.messages.append(message)


def _describe_alone(report: Report, location: Location, config: DataConfig) -> None:
    """Describe a file without a checkpoint."""
    contents = open_contents(location, config)
    source = source_of_contents(contents, config)
    if not looks_like_gene_ids(source.gene_ids):
        source = source_of_contents(contents, config, _vocab_of_symbols(source, config))
    _describe_genes(report, source, None)
    vocab = make_gene_vocab((gene for gene in source.gene_ids if gene), ["unknown"], "unknown")
    reader = CellReader(source, vocab, {}, config, NO_CHECKPOINT_SEQ_LEN)
    report.cells = len(source)
    check_obs([source], JoinedMetadata([source.obs]))
    _describe_cells(report, survey_cells([reader], config))
    _check_duplicates(source, config)


def _vocab_of_symbols(source: CellSource, config: DataConfig) -> GeneVocab | None:
    """Return the genes of the symbol map that knows most of the source's symbols, if it knows most of them."""
    symbols, ids = set(source.gene_ids), {gene for gene in source.gene_ids if looks_like_gene_ids([gene])}
    maps = load_symbol_maps(config.gene_map).values()
    best = max(maps, key=lambda symbol_map: len(symbols & symbol_map.keys()), default={})
    if len(symbols & best.keys()) < len(symbols - ids) / 2:
        return None
    return make_gene_vocab((*ids, *(gene for genes in best.values() for gene in genes)), ["unknown"], "unknown")


def _describe(report: Report, location: Location, checkpoint: Checkpoint, seconds_per_flop: float) -> CellSource:
    """Describe a file, from its genes to a run, and return it open."""
    data, vocab = checkpoint.config.model.data_config, checkpoint.gene_vocab
    source = source_of_contents(open_contents(location, data), data, vocab)
    _describe_genes(report, source, vocab)
    report.cells = len(source)
    if not checkpoint.config.model.inference_config.oom_dataloader:
        source.load()
    _check_duplicates(source, data, vocab)
    inputs = Inputs([source], Embeddings(checkpoint))
    inputs.check_obs(_as_zarr(checkpoint))
    survey = survey_cells(inputs.readers, data)
    _describe_cells(report, survey)
    report.cells_too_long, report.unseen_share = survey.n_too_long(inputs.seq_len), survey.unseen_share
    report.unknown_values = _unknown_values(inputs.readers[0])
    _estimate(report, survey, checkpoint, seconds_per_flop)
    return source


def _check_duplicates(source: CellSource, config: DataConfig, vocab: GeneVocab | None = None) -> None:
    if config.duplicate_genes == "error":  # otherwise it warns of what the report says anyway
        check_duplicates(source, config, vocab)


def _as_zarr(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.model.inference_config.output_filename.endswith(".zarr")


def _describe_genes(report: Report, source: CellSource, vocab: GeneVocab | None) -> None:
    ids, symbols = source.gene_ids, source.genes.symbols
    described = source.describe()
    report.counts_from, report.genes_from = described["counts"], described["genes"]
    report.genes, report.species = len(ids), likely_species(gene for gene in ids if gene)
    report.gene_ids = "stable gene ids" if looks_like_gene_ids(ids[ids != ""]) else "not stable gene ids; symbols?"
    if symbols is not None:
        report.gene_ids = "symbols"
        report.unknown_symbols, report.ambiguous_symbols = list(symbols.unknown), list(symbols.ambiguous)
    if vocab is not None:
        report.genes_known = source.genes.n_known
        report.genes_known_before = source.genes.n_known if symbols is None else symbols.n_known_before
    report.repeated_genes = int(source.is_duplicate.sum())
    if report.repeated_genes:
        repeated = pd.unique(ids[source.is_duplicate])
        report.repeated_examples = repeated[:5].tolist()
        counts = source.counts(0, min(len(source), SAMPLED_CELLS))
        of_gene = np.asarray(counts.sum(axis=0)).ravel()
        report.repeated_share = float(of_gene[np.isin(ids, repeated)].sum() / max(of_gene.sum(), 1))


def _describe_cells(report: Report, survey: Survey) -> None:
    report.cells_kept, report.cells_empty = survey.n_kept, survey.n_empty
    report.whole_numbers = survey.n_fractional == 0
    report.repeated_cell_names = survey.n_repeated_names
    report.mean_genes_per_cell = float(survey.lengths[survey.kept].mean())


def _unknown_values(reader: CellReader) -> dict[str, dict[str, int]]:
    unknown = {}
    for column, values in reader.aux_values.items():
        if not reader.columns_of(column):
            unknown[column] = {"(no such column)": len(reader)}
        elif values.unknown:
            unknown[column] = {"missing" if value is None else value: n for value, n in values.unknown.items()}
    return unknown


def _estimate(report: Report, survey: Survey, checkpoint: Checkpoint, seconds_per_flop: float) -> None:
    """Estimate the memory of a process and the time of matrix products, for the batches of `inference`."""
    model = checkpoint.config.model
    limits, seq_len = batch_limits(checkpoint), model.model_config.seq_len
    lengths = survey.lengths[survey.kept]
    longest = positions(int(lengths.max()), seq_len, checkpoint.min_positions)
    total_positions = int((lengths + LENGTH_MULTIPLE).clip(max=seq_len).sum())
    max_batch = min(limits.max_cells * longest, max(limits.max_tokens, longest), total_positions)
    report.memory_gib = (BASELINE_BYTES + checkpoint.weights_bytes + max_batch * bytes_per_token(checkpoint)) / 2**30
    block = lengths[: model.data_config.block_size]
    padded = sum(
        len(chosen) * positions(int(block[chosen].max()), seq_len, checkpoint.min_positions)
        for chosen in group_by_length(block, limits, seq_len, checkpoint.min_positions)
    )
    n_positions = padded / len(block) * len(lengths)
    report.seconds = n_positions * _flops_per_position(checkpoint, longest) * seconds_per_flop


def _flops_per_position(checkpoint: Checkpoint, n_positions: int) -> float:
    """Floating-point operations per batch position: linear layers, attention scores and gene embedding."""
    if isinstance(checkpoint.model, Esm2CE):
        return 2.0 * checkpoint.width
    config = checkpoint.config.model.model_config
    dim = config.embed_dim
    block = 2 * (4 * dim**2 + 2 * dim * config.model_dim) + 2 * dim * n_positions
    gene = 2 * dim * (checkpoint.model.gene_embeddings.embedding.embedding_dim + dim)
    return float(config.num_layers * block + gene)


def _seconds_per_flop(checkpoint: Checkpoint) -> float:
    """Measure matrix-product time on this device, with the model's width."""
    dtype = compute_dtype(checkpoint.config.model.inference_config.precision, checkpoint.device)
    dim = min(checkpoint.config.model.model_config.embed_dim, 2048)
    a, b = (torch.randn(1024, dim).to(checkpoint.device, dtype), torch.randn(dim, dim).to(checkpoint.device, dtype))
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # synchronizes with the device
        best = min(best, time.perf_counter() - started)
    return best / (2 * 1024 * dim**2)
