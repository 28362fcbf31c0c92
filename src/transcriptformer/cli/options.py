"""Options that several commands share.

Options default to None, which leaves the configuration's default in place; the help shows that default.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


def option(text: str, *names: str, metavar: str | None = None, default: object = None, **details: Any) -> Any:
    """Create a Typer option whose help ends with its default, if any; Typer itself would show None."""
    shown = "" if default is None else f"  [default: {default}]"
    return typer.Option(*names, metavar=metavar, help=text + shown, show_default=False, **details)


class UseRaw(StrEnum):
    """Values of `--use-raw`."""

    true = "true"
    false = "false"
    auto = "auto"
    published = "published"


def use_raw_setting(value: UseRaw | None) -> bool | str | None:
    """Convert `--use-raw` to its configuration value."""
    return {"true": True, "false": False}.get(str(value), value and str(value))


def input_settings(
    gene_col_name: str | None,
    gene_map: str | None,
    layer: str | None,
    modality: str | None,
    use_raw: UseRaw | None,
    recover_counts: bool | None,
    duplicate_genes: str | None,
    remove_duplicate_genes: bool | None,
    allow_external_links: bool | None,
) -> dict[str, object]:
    """Return the configuration values of the options that say what an input holds."""
    values = {
        "gene_col_name": gene_col_name,
        "gene_map": gene_map,
        "layer": layer,
        "modality": modality,
        "use_raw": use_raw_setting(use_raw),
        "recover_counts": recover_counts,
        "duplicate_genes": duplicate_genes,
        "remove_duplicate_genes": remove_duplicate_genes,
        "allow_external_links": allow_external_links,
    }
    return {f"model.data_config.{name}": value for name, value in values.items()}


def run_settings(
    output_path: Path | None,
    output_filename: str | None,
    batch_size: str | None,
    precision: str | None,
    device: str | None,
    make_names_unique: bool | None,
    num_gpus: int | None,
    num_nodes: int | None,
    resume: bool,
) -> dict[str, object]:
    """Return the configuration values of the options of a run from files to a file."""
    values = {
        "output_path": output_path and str(output_path),
        "output_filename": output_filename,
        "batch_size": batch_size_setting(batch_size),
        "precision": precision,
        "device": device,
        "make_names_unique": make_names_unique,
        "num_gpus": num_gpus,
        "num_nodes": num_nodes,
        "resume": resume or None,
    }
    return {f"model.inference_config.{name}": value for name, value in values.items()}


def batch_size_setting(value: str | None) -> int | str | None:
    """Convert `--batch-size` to its configuration value, which is validated there."""
    return int(value) if value is not None and value.isdigit() else value


def paths_setting(values: list[Path] | None) -> list[str] | None:
    """Convert the paths of a repeatable option to a configuration value."""
    return [str(path) for path in values or []] or None


GeneColName = Annotated[
    str | None, option("Column of var with gene ids or symbols, or index.", metavar="NAME|index|auto", default="auto")
]
GeneMap = Annotated[
    str | None,
    option("Map of gene symbols to ids: TSV, GTF, FASTA, h5ad.", metavar="FILE", default="human and mouse"),
]
Layer = Annotated[str | None, option("Layer with the counts.", metavar="NAME")]
Modality = Annotated[str | None, option("Modality of a MuData file.", metavar="NAME", default="rna")]
RecoverCounts = Annotated[
    bool | None, option("Recover counts from normalized values, where that is exact.", "--recover-counts")
]
DuplicateGenes = Annotated[
    str | None, option("What to do with repeated gene ids.", metavar="error|first|sum", default="error")
]
UseRawOption = Annotated[
    UseRaw | None,
    option(
        "Counts in .raw, in .X, or where whole numbers are.",
        metavar="true|false|auto|published",
        default="auto",
        case_sensitive=False,
    ),
]
RemoveDuplicateGenes = Annotated[
    bool | None, option("Published name of --duplicate-genes first.", "--remove-duplicate-genes")
]
MakeNamesUnique = Annotated[
    bool | None, option("Append file names to cell names, and numbers to repeated ones.", "--make-names-unique")
]
PretrainedEmbedding = Annotated[
    list[Path] | None, option("Protein embeddings of a new species; repeatable.", metavar="FILE")
]
AllowExternalLinks = Annotated[
    bool | None, option("Follow links from inputs to other files.", "--allow-external-links")
]
InferenceBatchSize = Annotated[str | None, option("Maximum cells per batch.", metavar="INT|auto", default="auto")]

PRECISION, PRECISIONS = "Precision; 16-mixed falls back to bf16 or 32 on a CPU.", "16-mixed|bf16-mixed|32"
Precision = Annotated[str | None, option(PRECISION, metavar=PRECISIONS, default="16-mixed")]
Device = Annotated[str | None, option("Device to compute on.", metavar="auto|cpu|cuda|mps", default="auto")]
NumGpus = Annotated[int | None, option("GPUs, -1 for all; on a CPU, processes.", metavar="INT", default=1)]
NumNodes = Annotated[int | None, option("Machines; start the command on each.", metavar="INT", default=1)]
NDataWorkers = Annotated[int | None, option("Data-loading worker processes, per process.", metavar="INT", default=0)]
Resume = Annotated[bool, option("Continue an interrupted run.", "--resume")]
MaxRetries = Annotated[
    int, option("Failed attempts without progress before giving up.", metavar="INT", default=5, min=0)
]
ConfigOverride = Annotated[
    list[str] | None, option("Any configuration value; applied last; repeatable.", metavar="KEY.PATH=VALUE")
]
Debug = Annotated[bool, option("Show the traceback of an error.", "--debug")]
