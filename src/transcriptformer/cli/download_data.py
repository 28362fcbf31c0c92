"""`transcriptformer download-data`: datasets of CELLxGENE."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transcriptformer.cli.options import Debug, MaxRetries, option

if TYPE_CHECKING:
    from transcriptformer.data.bulk_download import Dataset, Outcome
    from transcriptformer.fetching.fetcher import Fetcher


PROCESSES, CELLS_PER_FILE, STABLE = 4, 50_000, "stable"


class Source(StrEnum):
    """Values of `--source`."""

    discover = "discover"
    census = "census"


def download_data(
    species: Annotated[
        str, option("Latin names, such as 'homo sapiens,mus musculus'; required.", metavar="NAME[,NAME…]")
    ] = "",
    output_dir: Annotated[Path, option("Output folder.", metavar="DIR", default="data/cellxgene")] = Path(
        "data/cellxgene"
    ),
    processes: Annotated[int, option("Parallel downloads.", metavar="INT", default=PROCESSES, min=1)] = PROCESSES,
    max_retries: MaxRetries = 5,
    no_metadata: Annotated[bool, option("Do not write dataset_metadata.json.", "--no-metadata")] = False,
    test_only: Annotated[bool, option("Only test the connection to the service.", "--test-only")] = False,
    dry_run: Annotated[bool, option("Only print numbers of datasets, cells and bytes.", "--dry-run")] = False,
    tissue: Annotated[str, option("Only datasets of these tissues.", metavar="NAME[,NAME…]")] = "",
    assay: Annotated[str, option("Only datasets of these assays.", metavar="NAME[,NAME…]")] = "",
    disease: Annotated[str, option("Only datasets of these diseases.", metavar="NAME[,NAME…]")] = "",
    collection: Annotated[
        list[str] | None,
        option("Only datasets of this collection (id, URL, DOI or name); repeatable.", metavar="ID"),
    ] = None,
    max_datasets: Annotated[int | None, option("Maximum number of datasets.", metavar="INT", min=1)] = None,
    source: Annotated[
        Source,
        option("Published datasets, or cells of the CELLxGENE Census.", metavar="discover|census", default="discover"),
    ] = Source.discover,
    cell_filter: Annotated[
        str,
        option("Census: filter expression, such as \"tissue_general == 'lung'\".", "--filter", metavar="EXPRESSION"),
    ] = "",
    cells_per_file: Annotated[
        int, option("Census: maximum cells per file.", metavar="INT", default=CELLS_PER_FILE, min=1)
    ] = CELLS_PER_FILE,
    census_version: Annotated[
        str, option("Census: stable, latest or a date.", metavar="NAME", default=STABLE)
    ] = STABLE,
    census_uri: Annotated[str | None, option("Census: URI of a local copy or mirror.", metavar="URI")] = None,
    debug: Debug = False,
) -> None:
    """Download datasets with raw counts from CELLxGENE.

    An interrupted download continues when the command is run again. The exit code is 0 if everything is complete.
    """
    from transcriptformer.cli.reporting import plain_errors, resumable, say

    with plain_errors(debug), resumable():
        from transcriptformer.errors import UsageError

        names = {key: _names(text) for key, text in (("species", species), ("tissue", tissue), ("assay", assay))}
        if not test_only and not names["species"]:
            raise UsageError("--species: name at least one, such as --species 'homo sapiens'")
        discover_only: dict[str, object] = {
            "--tissue": tissue,
            "--assay": assay,
            "--disease": disease,
            "--collection": collection,
        }
        discover_only |= {"--max-datasets": max_datasets, "--test-only": test_only, "--no-metadata": no_metadata}
        discover_only["--processes"] = processes != PROCESSES
        census_only: dict[str, object] = {"--filter": cell_filter, "--census-uri": census_uri}
        census_only |= {
            "--cells-per-file": cells_per_file != CELLS_PER_FILE,
            "--census-version": census_version != STABLE,
        }
        other = Source.discover if source == Source.census else Source.census
        for name, value in (discover_only if source == Source.census else census_only).items():
            if value:
                raise UsageError(f"{name} applies only to --source {other}")
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
    from transcriptformer.data.bulk_download import find_asset
    from transcriptformer.fetching.fetcher import format_size

    cells = sum(dataset.get("cell_count") or 0 for dataset in datasets)
    n_bytes = sum(asset.size or 0 for dataset in datasets if (asset := find_asset(dataset)))
    say(f"{len(datasets):,} datasets with {cells:,} cells, {format_size(n_bytes)}")


def _download(
    datasets: "list[Dataset]", output_dir: Path, fetcher: "Fetcher", processes: int, save_metadata: bool
) -> None:
    from transcriptformer.cli.reporting import ByteProgress
    from transcriptformer.data.bulk_download import download_datasets

    with ByteProgress() as progress:
        fetcher.advance, fetcher.resumed = progress.advance, progress.resumed
        outcomes = download_datasets(datasets, output_dir, fetcher, processes, save_metadata, progress.expect)
    _print_outcomes(outcomes)
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _print_outcomes(outcomes: "list[Outcome]") -> None:
    """Print totals, and each dataset that failed."""
    from rich.table import Table
    from rich.text import Text

    from transcriptformer.cli.reporting import printable, show
    from transcriptformer.fetching.fetcher import format_size

    table = Table("", "datasets", "cells", "size")
    for status in ("downloaded", "already present", "failed"):
        of_it = [outcome for outcome in outcomes if outcome.status == status]
        cells, n_bytes = sum(o.cells for o in of_it), sum(o.n_bytes for o in of_it)
        table.add_row(status, f"{len(of_it):,}", f"{cells:,}", format_size(n_bytes))
    show(table)
    for outcome in outcomes:
        if outcome.status == "failed":
            reason = " ".join(outcome.reason.split())
            show(Text(printable(f"failed: {outcome.dataset_id}: {reason}")))


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
                say(f"{file.path}: {file.n_cells:,} cells{'' if file.is_new else ', already present'}")
