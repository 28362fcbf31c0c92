"""`transcriptformer download-data`: datasets of CELLxGENE."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transcriptformer.data.bulk_download import Dataset, Outcome
    from transcriptformer.fetching.fetcher import Fetcher


class Source(StrEnum):
    """Values of `--source`."""

    discover = "discover"
    census = "census"


def download_data(
    species: Annotated[
        str, typer.Option(metavar="NAME[,NAME…]", help="Latin names, such as 'homo sapiens,mus musculus'. Required.")
    ] = "",
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the datasets.")] = Path("data/cellxgene"),
    processes: Annotated[int, typer.Option(metavar="INT", min=1, help="Downloads at once.")] = 4,
    max_retries: Annotated[
        int, typer.Option(metavar="INT", min=0, help="Tries in a row that may fail, after the first.")
    ] = 5,
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="Write no dataset_metadata.json.")] = False,
    test_only: Annotated[bool, typer.Option("--test-only", help="Only ask whether the service answers.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many datasets, cells, bytes.")] = False,
    tissue: Annotated[
        str, typer.Option(metavar="NAME[,NAME…]", help="Only datasets of these tissues.", show_default=False)
    ] = "",
    assay: Annotated[
        str, typer.Option(metavar="NAME[,NAME…]", help="Only datasets of these assays.", show_default=False)
    ] = "",
    disease: Annotated[
        str, typer.Option(metavar="NAME[,NAME…]", help="Only datasets of these diseases.", show_default=False)
    ] = "",
    collection: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Only datasets of this collection (id, address, DOI, name); may be repeated."),
    ] = None,
    max_datasets: Annotated[
        int | None, typer.Option(metavar="INT", min=1, help="Only the first so many datasets.")
    ] = None,
    source: Annotated[
        Source,
        typer.Option(
            metavar="discover|census", help="Datasets as they were published, or cells of the CELLxGENE Census."
        ),
    ] = Source.discover,
    cell_filter: Annotated[
        str,
        typer.Option(
            "--filter",
            metavar="EXPRESSION",
            help="Census: which cells, such as \"tissue_general == 'lung' and is_primary_data == True\".",
            show_default=False,
        ),
    ] = "",
    cells_per_file: Annotated[int, typer.Option(metavar="INT", min=1, help="Census: most cells in a file.")] = 50_000,
    census_version: Annotated[str, typer.Option(metavar="NAME", help="Census: stable, latest or a date.")] = "stable",
    census_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="Census: a local or mirrored one instead.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Download datasets with raw counts from CELLxGENE.

    What was fetched when a run ended is kept: the same command goes on from there. The exit code is 0 if all is there.
    """
    from transcriptformer.cli.reporting import plain_errors, resumable, say

    with plain_errors(debug), resumable():
        from transcriptformer.errors import UsageError

        names = {option: _names(text) for option, text in (("species", species), ("tissue", tissue), ("assay", assay))}
        if not test_only and not names["species"]:
            raise UsageError("--species: name at least one, such as --species 'homo sapiens'")
        discover_only: dict[str, object] = {
            "--tissue": tissue,
            "--assay": assay,
            "--disease": disease,
            "--collection": collection,
        }
        discover_only |= {"--max-datasets": max_datasets, "--test-only": test_only}
        census_only: dict[str, object] = {"--filter": cell_filter, "--census-uri": census_uri}
        for option, value in (discover_only if source == Source.census else census_only).items():
            if value:
                raise UsageError(f"{option} does not go with --source {source}")
        if source == Source.census:
            _from_census(names["species"], output_dir, cell_filter, cells_per_file, census_uri, census_version, dry_run)
            return

        from transcriptformer.data.bulk_download import Selection, api_address, list_datasets, select_datasets
        from transcriptformer.fetching.fetcher import Fetcher

        fetcher = Fetcher(max_retries)
        datasets = list_datasets(fetcher)
        if test_only:
            say(f"{api_address()} answers: {len(datasets):,} datasets")
            return
        wanted = Selection(
            **names, disease=_names(disease), collection=tuple(collection or ()), max_datasets=max_datasets
        )
        chosen = select_datasets(datasets, wanted)
        _print_selection(chosen)
        if not dry_run:
            _download(chosen, output_dir, fetcher, processes, not no_metadata)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _print_selection(datasets: "list[Dataset]") -> None:
    from transcriptformer.cli.reporting import say
    from transcriptformer.data.bulk_download import asset_or_none
    from transcriptformer.fetching.fetcher import gigabytes

    cells = sum(dataset.get("cell_count") or 0 for dataset in datasets)
    n_bytes = sum(asset.size or 0 for dataset in datasets if (asset := asset_or_none(dataset)))
    say(f"{len(datasets):,} datasets with {cells:,} cells, {gigabytes(n_bytes)}")


def _download(
    datasets: "list[Dataset]", output_dir: Path, fetcher: "Fetcher", processes: int, save_metadata: bool
) -> None:
    from transcriptformer.cli.reporting import ByteProgress
    from transcriptformer.data.bulk_download import download_datasets

    with ByteProgress() as progress:
        fetcher.advance, fetcher.found = progress.advance, progress.found
        outcomes = download_datasets(datasets, output_dir, fetcher, processes, save_metadata, progress.expect)
    _print_outcomes(outcomes)
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _print_outcomes(outcomes: "list[Outcome]") -> None:
    """What came, in sum, and each dataset that did not."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from transcriptformer.cli.reporting import printable
    from transcriptformer.fetching.fetcher import gigabytes

    table = Table("", "datasets", "cells", "size")
    for status in ("downloaded", "there already", "failed"):
        of_it = [outcome for outcome in outcomes if outcome.status == status]
        cells, n_bytes = sum(o.cells for o in of_it), sum(o.n_bytes for o in of_it)
        table.add_row(status, f"{len(of_it):,}", f"{cells:,}", gigabytes(n_bytes))
    console = Console(soft_wrap=True)
    console.print(table)
    for outcome in outcomes:
        if outcome.status == "failed":
            reason = " ".join(outcome.reason.split())
            console.print(Text(printable(f"failed: {outcome.dataset_id}: {reason}")))


def _from_census(
    species: tuple[str, ...],
    output_dir: Path,
    cell_filter: str,
    cells_per_file: int,
    uri: str | None,
    version: str,
    dry_run: bool,
) -> None:
    from transcriptformer.cli.reporting import say
    from transcriptformer.data.census import check_species, download_cells, find_cells, open_census

    with open_census(uri, version) as census:
        check_species(census, species)
        for name in species:
            if dry_run:
                n_cells = len(find_cells(census, name, cell_filter))
                say(f"{name}: {n_cells:,} cells, {-(-n_cells // cells_per_file):,} files")
                continue
            for file in download_cells(census, name, output_dir, cell_filter, cells_per_file):
                say(f"{file.path}: {file.n_cells:,} cells{'' if file.is_new else ', there already'}")
