"""`transcriptformer check`: validate files and estimate a run."""

import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transcriptformer.cli.options import (
    AllowExternalLinks,
    ConfigOverride,
    Debug,
    Device,
    DuplicateGenes,
    GeneColName,
    GeneMap,
    InferenceBatchSize,
    Layer,
    Modality,
    Precision,
    PretrainedEmbedding,
    RecoverCounts,
    RemoveDuplicateGenes,
    UseRawOption,
    batch_size_setting,
    input_settings,
    option,
    paths_setting,
)

if TYPE_CHECKING:
    from transcriptformer.inference.check import Report


_NOT_OF_INFERENCE = ("files", "checkpoint_path", "as_json", "debug")
"""Parameters that `inference` lacks, or that are named otherwise there."""


def check(
    context: typer.Context,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="h5ad files or zarr stores.")],
    checkpoint_path: Annotated[Path | None, option("Checkpoint to check the files against.", metavar="DIR")] = None,
    gene_col_name: GeneColName = None,
    gene_map: GeneMap = None,
    layer: Layer = None,
    modality: Modality = None,
    use_raw: UseRawOption = None,
    recover_counts: RecoverCounts = None,
    duplicate_genes: DuplicateGenes = None,
    remove_duplicate_genes: RemoveDuplicateGenes = None,
    pretrained_embedding: PretrainedEmbedding = None,
    allow_external_links: AllowExternalLinks = None,
    batch_size: InferenceBatchSize = None,
    precision: Precision = None,
    device: Device = None,
    config_override: ConfigOverride = None,
    as_json: Annotated[bool, option("Print JSON.", "--json")] = False,
    debug: Debug = False,
) -> None:
    """Validate files for inference and estimate a run, without computing embeddings.

    The last line is the command that embeds the files; the exit code is 1 if inference would refuse one.
    """
    options: dict[str, object] = {
        **input_settings(
            *(gene_col_name, gene_map, layer, modality, use_raw, recover_counts),
            *(duplicate_genes, remove_duplicate_genes, allow_external_links),
        ),
        "model.inference_config.pretrained_embedding": paths_setting(pretrained_embedding),
        "model.inference_config.batch_size": batch_size_setting(batch_size),
        "model.inference_config.precision": precision,
        "model.inference_config.device": device,
    }
    from transcriptformer.cli.reporting import plain_errors, say

    with plain_errors(debug):
        from transcriptformer.data.store import find_files
        from transcriptformer.errors import UsageError
        from transcriptformer.inference.check import check as check_files

        if checkpoint_path is None and (config_override or pretrained_embedding or batch_size or precision or device):
            raise UsageError("without --checkpoint-path, only options about the file's own counts and genes apply")
        logging.getLogger("transcriptformer").setLevel(logging.WARNING)  # the report says what is inferred
        locations = [location for name in files for location in find_files(name)]
        reports = check_files(locations, checkpoint_path, options, config_override or [])
        is_refused = any(report.refused for report in reports)
        command = None if is_refused else _command(context, [report.file for report in reports], checkpoint_path)
        if as_json:
            typer.echo(json.dumps({"files": [report.to_dict() for report in reports], "command": command}, indent=1))
        else:
            for report in reports:
                _print_table(report)
            if command is not None:
                say(f"To compute the embeddings, run:\n{command}")
    if is_refused:
        raise typer.Exit(1)


def _command(context: typer.Context, files: Sequence[str], checkpoint_path: Path | None) -> str:
    """Return the command that embeds files with the options given to this one."""
    command = ["transcriptformer", "inference", "--checkpoint-path", str(checkpoint_path or "CHECKPOINT")]
    for file in files:
        command += ["--data-file", file]
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE" or parameter.name in _NOT_OF_INFERENCE:
            continue
        value = context.params[str(parameter.name)]
        for item in value if isinstance(value, list | tuple) else [value]:
            command += [parameter.opts[0]] if item is True else [parameter.opts[0], str(item)]
    return shlex.join(command)


def _print_table(report: "Report") -> None:
    from rich.table import Table
    from rich.text import Text

    from transcriptformer.cli.reporting import printable, show

    table = Table(title=Text(printable(report.file)), title_justify="left", show_header=False)
    for name, value in _rows(report):
        table.add_row(Text(printable(name)), Text(printable(value)))
    show(table)


def _rows(report: "Report") -> list[tuple[str, str]]:
    """Return the rows of the table, each a name and a value."""
    rows = [*_cell_rows(report), *_gene_rows(report)]
    for column, values in report.unknown_values.items():  # warnings name the others
        if "missing" in values:
            rows.append((f"missing {column}", f"{values['missing']:,} cells"))
    rows += [("warning", warning.removeprefix(f"{report.file}: ")) for warning in report.warnings]
    if report.memory_gib is not None and report.seconds is not None:
        rows.append(("estimate", f"{report.memory_gib:.1f} GiB of memory, {_duration(report.seconds)} of computing"))
    rows.append(("inference", f"would refuse: {report.refused}" if report.refused else "would accept it"))
    return rows


def _cell_rows(report: "Report") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if report.cells is not None:
        dropped = "" if report.cells_kept in (None, report.cells) else f", {report.cells_kept} after the filters"
        rows.append(("cells", f"{report.cells:,}{dropped}"))
    if report.repeated_cell_names:
        rows.append(("repeated cell names", f"{report.repeated_cell_names:,} cells"))
    if report.counts_from is not None:
        whole = "; whole numbers" if report.whole_numbers else ""
        rows.append(("counts", report.counts_from.removeprefix("counts ") + whole))
    if report.mean_genes_per_cell is not None:
        rows.append(("genes per cell", f"{report.mean_genes_per_cell:,.0f} on average"))
    if report.cells_empty:
        rows.append(("empty cells", f"{report.cells_empty:,}"))
    if report.cells_too_long is not None and report.unseen_share is not None and report.cells_too_long:
        share = 100 * report.unseen_share
        rows.append(("cells too long", f"{report.cells_too_long:,}; {share:.1f} % of all counts are not seen"))
    return rows


def _gene_rows(report: "Report") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if report.genes is None:
        return rows
    species = f", likely {report.species}" if report.species else ""
    rows.append(("genes", f"{report.genes:,}: {report.gene_ids}{species}"))
    rows.append(("named by", str(report.genes_from).removeprefix("gene ids from ").removeprefix("gene symbols from ")))
    if report.genes_known is not None:
        share = 100 * report.genes_known / report.genes
        before = report.genes_known_before
        mapped = "" if before in (None, report.genes_known) else f"; {before:,} before mapping symbols"
        rows.append(("in the vocabulary", f"{report.genes_known:,} ({share:.1f} % of the file's genes){mapped}"))
    if report.repeated_genes:
        examples = ", ".join(report.repeated_examples)
        share = 100 * (report.repeated_share or 0)
        rows.append(
            (
                "repeated gene ids",
                f"{report.repeated_genes:,} columns ({examples}), {share:.1f} % of counts in these genes",
            )
        )
    return rows


def _duration(seconds: float) -> str:
    for size, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return "1 second" if seconds < 1.5 else f"{seconds:.0f} seconds"
