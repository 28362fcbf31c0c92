"""Lists of genes and tables of prompts, read from text files."""

import csv
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from transcriptformer.errors import UsageError, one_line
from transcriptformer.generation.prompts import AuxValue, GeneCount, parse_gene_count

GENES_COLUMN, NAME_COLUMN = "genes", "name"
_DESCRIPTION = "n_genes"
"""Column of a result's `obs`, which is ignored so that such a table can be read."""


class PromptTable(NamedTuple):
    """Prompts of a table.

    Attributes
    ----------
    names
        Name of each prompt, by default its number.
    prompts
        Genes with their counts, in order.
    aux
        Values of metadata columns, one per prompt.
    """

    names: list[str]
    prompts: list[list[GeneCount]]
    aux: dict[str, AuxValue]


def read_genes(path: Path, option: str) -> list[str]:
    """Read genes, one a line; empty lines, and what follows a #, are ignored.

    Raises
    ------
    UsageError
        If the file cannot be read or names no gene.
    """
    with _readable(path, option):
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    genes = [line for line in lines if line]
    if not genes:
        raise UsageError(f"{option} {path}: names no gene; give one gene a line")
    return genes


def read_prompts(path: Path, option: str) -> PromptTable:
    """Read prompts, one a row, from a CSV or tab-separated table with a header.

    Column `genes` holds GENE=COUNT or GENE, separated by blanks, and may be empty; `name` names the prompt; other
    columns hold metadata, such as `assay`, where empty means unknown.

    Raises
    ------
    UsageError
        If the file cannot be read, or lacks rows or the column `genes`.
    """
    with _readable(path, option):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = list(csv.DictReader(lines, delimiter="\t" if lines and "\t" in lines[0] else ",", strict=True))
    columns = list(rows[0]) if rows else []
    if not rows:
        raise UsageError(f"{option} {path}: holds no prompts; give a header with the column {GENES_COLUMN}, and rows")
    if GENES_COLUMN not in columns:
        raise UsageError(f"{option} {path}: has no column {GENES_COLUMN!r}; its columns are: {', '.join(columns)}")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise UsageError(f"{option} {path}: prompt {number} has another number of values than the header")
    prompts: list[list[GeneCount]] = [
        [parse_gene_count(gene, f"{option} {path}:") for gene in row[GENES_COLUMN].split()] for row in rows
    ]
    names = [row.get(NAME_COLUMN) or str(i) for i, row in enumerate(rows)]
    repeated = next((name for name, n in Counter(names).items() if n > 1), None)
    if repeated is not None:
        raise UsageError(f"{option} {path}: {repeated!r} names several prompts; give each another name")
    others = [column for column in columns if column not in (GENES_COLUMN, NAME_COLUMN, _DESCRIPTION, "")]
    return PromptTable(names, prompts, {column: [row[column] or None for row in rows] for column in others})


@contextmanager
def _readable(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UsageError(f"{option} {path}: no such file") from error
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{option} {path}: cannot be read ({one_line(error)})") from error
