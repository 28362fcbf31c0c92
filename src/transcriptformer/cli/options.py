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


def use_raw_setting(value: UseRaw | None) -> bool | str | None:
    """Convert `--use-raw` to its configuration value."""
    return {"true": True, "false": False, "auto": "auto", None: None}[value]


def batch_size_setting(value: str | None) -> int | str | None:
    """Convert `--batch-size` to its configuration value, which is validated there."""
    return int(value) if value is not None and value.isdigit() else value


def paths_setting(values: list[Path] | None) -> list[str] | None:
    """Convert the paths of a repeatable option to a configuration value."""
    return [str(path) for path in values or []] or None


GeneColName = Annotated[
    str | None, option("Column of var with Ensembl gene ids, or index.", metavar="NAME", default="ensembl_id")
]
UseRawOption = Annotated[
    UseRaw | None,
    option(
        "Take counts from .raw, from .X, or from .raw if present.",
        metavar="true|false|auto",
        default="auto",
        case_sensitive=False,
    ),
]
RemoveDuplicateGenes = Annotated[
    bool | None, option("Keep the first column of each repeated gene id.", "--remove-duplicate-genes")
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
