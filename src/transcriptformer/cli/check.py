"""`transcriptformer check`: validate files and estimate a run."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transcriptformer.cli.options import (
    AllowExternalLinks,
    ConfigOverride,
    Debug,
    Device,
    GeneColName,
    InferenceBatchSize,
    Precision,
    PretrainedEmbedding,
    RemoveDuplicateGenes,
    UseRawOption,
    batch_size_setting,
    option,
    paths_setting,
    use_raw_setting,
)

if TYPE_CHECKING:
    from transcriptformer.inference.check import Report


def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="h5ad files or zarr stores.")],
    checkpoint_path: Annotated[Path | None, option("Checkpoint to check the files against.", metavar="DIR")] = None,
    gene_col_name: GeneColName = None,
    use_raw: UseRawOption = None,
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

    The exit code is 1 if inference would refuse a file.
    """
    options: dict[str, object] = {
        "model.data_config.gene_col_name": gene_col_name,
        "model.data_config.use_raw": use_raw_setting(use_raw),
        "model.data_config.remove_duplicate_genes": remove_duplicate_genes,
        "model.data_config.allow_external_links": allow_external_links,
        "model.inference_config.pretrained_embedding": paths_setting(pretrained_embedding),
        "model.inference_config.batch_size": batch_size_setting(batch_size),
        "model.inference_config.precision": precision,
        "model.inference_config.device": device,
    }
    from transcriptformer.cli.reporting import plain_errors

    with plain_errors(debug):
        from transcriptformer.errors import UsageError
        from transcriptformer.inference.check import check as check_files

        if checkpoint_path is None and (config_override or pretrained_embedding or batch_size or precision or device):
            raise UsageError("without --checkpoint-path, only options about the file's own counts and genes apply")
        logging.getLogger("transcriptformer").setLevel(logging.ERROR)  # the report says it all
        reports = check_files(files, checkpoint_path, options, config_override or [])
        if as_json:
            typer.echo(json.dumps({"files": [report.to_dict() for report in reports]}, indent=1))
        else:
            for report in reports:
                _print_table(report)
    if any(report.refused for report in reports):
        raise typer.Exit(1)


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
    rows: list[tuple[str, str]] = []
    if report.cells is not None:
        dropped = "" if report.cells_kept in (None, report.cells) else f", {report.cells_kept} after the filters"
        rows.append(("cells", f"{report.cells:,}{dropped}"))
    if report.genes is not None:
        species = f", likely {report.species}" if report.species else ""
        rows.append(("genes", f"{report.genes:,}: {report.gene_ids}{species}"))
    if report.genes is not None and report.genes_known is not None:
        share = 100 * report.genes_known / report.genes
        rows.append(("in the vocabulary", f"{report.genes_known:,} ({share:.1f} % of the file's genes)"))
    if report.repeated_genes:
        rows.append(("repeated gene ids", f"{report.repeated_genes:,} columns"))
    if report.repeated_cell_names:
        rows.append(("repeated cell names", f"{report.repeated_cell_names:,} cells"))
    if report.whole_numbers is not None:
        rows.append(
            ("counts", "whole numbers" if report.whole_numbers else "NOT whole numbers; raw counts are expected")
        )
    if report.mean_genes_per_cell is not None:
        rows.append(("genes per cell", f"{report.mean_genes_per_cell:,.0f} on average"))
    if report.cells_empty:
        rows.append(("empty cells", f"{report.cells_empty:,}"))
    if report.cells_too_long is not None and report.unseen_share is not None and report.cells_too_long:
        share = 100 * report.unseen_share
        rows.append(("cells too long", f"{report.cells_too_long:,}; {share:.1f} % of all counts are not seen"))
    for column, values in report.unknown_values.items():
        some = ", ".join(f"{value} ({n:,} cells)" for value, n in list(values.items())[:5])
        more = f" and {len(values) - 5} more values" if len(values) > 5 else ""
        rows.append((f"unknown {column}", some + more))
    if report.memory_gib is not None and report.seconds is not None:
        rows.append(("estimate", f"{report.memory_gib:.1f} GiB of memory, {_duration(report.seconds)} of computing"))
    rows.append(("inference", f"would refuse: {report.refused}" if report.refused else "would accept it"))
    return rows


def _duration(seconds: float) -> str:
    for size, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(seconds, 1):.0f} seconds"
