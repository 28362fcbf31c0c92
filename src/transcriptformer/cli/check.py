"""`transcriptformer check`: what `inference` would make of files."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transcriptformer.cli.inference import UseRaw, batch_size_setting, use_raw_setting

if TYPE_CHECKING:
    from transcriptformer.inference.check import Report


def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="h5ad file or zarr store; several may be given.")],
    checkpoint_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Checkpoint that they are meant for.")
    ] = None,
    gene_col_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of var with gene ids.", show_default="ensembl_id")
    ] = None,
    use_raw: Annotated[
        UseRaw | None,
        typer.Option(
            metavar="true|false|auto", help="Where the counts are.", case_sensitive=False, show_default="auto"
        ),
    ] = None,
    remove_duplicate_genes: Annotated[
        bool | None, typer.Option("--remove-duplicate-genes", help="Keep the first column of each gene id.")
    ] = None,
    pretrained_embedding: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Protein embeddings of a new species; may be repeated.")
    ] = None,
    allow_external_links: Annotated[
        bool | None,
        typer.Option("--allow-external-links", help="Follow links in inputs to other files, and virtual datasets."),
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option(metavar="INT|auto", help="For the estimates.", show_default="8")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="16-mixed|bf16-mixed|32", help="For the estimates.", show_default="16-mixed")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="auto|cpu|cuda|mps", help="For the estimates.", show_default="auto")
    ] = None,
    config_override: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY.PATH=VALUE", help="Any configuration value; needs --checkpoint-path."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Say what inference would make of files, without computing anything.

    The exit code is 0, or 1 where inference would refuse a file.
    """
    options: dict[str, object] = {
        "model.data_config.gene_col_name": gene_col_name,
        "model.data_config.use_raw": use_raw_setting(use_raw),
        "model.data_config.remove_duplicate_genes": remove_duplicate_genes,
        "model.data_config.allow_external_links": allow_external_links,
        "model.inference_config.pretrained_embedding": [str(p) for p in pretrained_embedding or []] or None,
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
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from transcriptformer.cli.reporting import printable

    table = Table(title=Text(printable(report.file)), title_justify="left", show_header=False)
    for name, value in _rows(report):
        table.add_row(Text(printable(name)), Text(printable(value)))
    Console(soft_wrap=True).print(table)


def _rows(report: "Report") -> list[tuple[str, str]]:
    """What is known, in words."""
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
