"""Maps of gene symbols to gene ids: the shipped ones, and those read from files."""

import csv
import gzip
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import chain, islice
from pathlib import Path

import h5py
import pandas as pd

from transcriptformer.config import shipped_file
from transcriptformer.data.genes import ID_COLUMNS, SYMBOL_COLUMNS, SymbolMap, resolve
from transcriptformer.data.metadata import open_metadata
from transcriptformer.data.species import looks_like_gene_ids
from transcriptformer.data.store import Store
from transcriptformer.errors import DataError, UsageError, one_line

SHIPPED = ("homo_sapiens", "mus_musculus")
"""Species with a shipped map of symbols, made by scripts/gene_symbols.py."""

OPTION = "--gene-map"

_PEEKED_LINES = 100
"""Lines that tell the format."""

_GTF_FIELD = re.compile(r'(gene_id|gene_name) "([^"]*)"')
_FASTA_FIELD = re.compile(r"(?:^|\s)(gene|gene_symbol):(\S+)")


def load_symbol_maps(file: str | None) -> Mapping[str, SymbolMap]:
    """Return symbol maps by name of their source: that of a file, or the shipped ones.

    Raises
    ------
    UsageError
        If the file does not exist.
    DataError
        If it holds no pairs of gene ids and symbols.
    """
    if file is not None:
        path = Path(file)
        return {path.name: _read_once(path, path.stat().st_mtime_ns) if path.is_file() else read_symbol_map(path)}
    return {f"the shipped map of {species}": _read_shipped(species) for species in SHIPPED}


@cache
def _read_once(path: Path, modified: int) -> SymbolMap:
    """Read a map of symbols, or return the one read before, unless the file was modified since."""
    return read_symbol_map(path)


def read_symbol_map(path: Path) -> SymbolMap:
    """Read pairs of gene ids and symbols from a table, a GTF, FASTA headers or an h5ad with both in `var`.

    Columns of a table are found by usual names in its header, such as gene_id and gene_symbol. Without them, gene ids
    are found by their looks, and symbols are the other one of two columns.
    """
    if not path.is_file():
        raise UsageError(f"{OPTION} {path}: no such file")
    try:
        pairs = _pairs_of_h5ad(path) if h5py.is_hdf5(path) else _pairs_of_text(_lines(path))
        found = _collect(pairs)
    except (OSError, ValueError, KeyError, EOFError, csv.Error) as error:
        raise DataError(f"{OPTION} {path}: cannot be read ({one_line(error)})") from error
    if not found:
        raise DataError(
            f"{OPTION} {path}: no pairs of gene ids and symbols; give a table with columns gene_id and gene_symbol, a "
            "GTF, a protein FASTA of Ensembl, or an h5ad with both in var"
        )
    return found


@cache
def _read_shipped(species: str) -> SymbolMap:
    return _collect(_pairs_of_text(_lines(shipped_file(f"gene_symbols/{species}.tsv.gz"))))


def _collect(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Group the ids of each symbol; symbols that are missing, or ids themselves, are left out."""
    ids: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for gene, symbol in pairs:
        (clean_id,), (clean_symbol,) = resolve([gene], None), resolve([symbol], None)
        if clean_id and clean_symbol and clean_symbol != clean_id:
            ids[clean_symbol][clean_id] = None
    return {symbol: tuple(found) for symbol, found in ids.items()}


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    with (gzip.open if is_gzip else open)(path, "rt", encoding="utf-8", errors="replace") as text:
        yield from (line.rstrip("\r\n") for line in text)


def _pairs_of_text(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    rows: Iterator[str] = (line for line in lines if line and not line.startswith("#"))
    first = list(islice(rows, _PEEKED_LINES))
    rows = chain(first, rows)
    if first and first[0].startswith(">"):
        fields = (dict(_FASTA_FIELD.findall(line)) for line in rows if line.startswith(">"))
        yield from ((found["gene"], found["gene_symbol"]) for found in fields if len(found) == 2)
    elif any('gene_id "' in line for line in first):
        fields = (dict(_GTF_FIELD.findall(line)) for line in rows if "\tgene\t" in line or "\ttranscript\t" in line)
        yield from ((found["gene_id"], found["gene_name"]) for found in fields if len(found) == 2)
    else:
        yield from _pairs_of_table(list(rows), "\t" if any("\t" in line for line in first) else ",")


def _pairs_of_table(rows: list[str], separator: str) -> Iterator[tuple[str, str]]:
    cells = [[cell.strip() for cell in row] for row in csv.reader(rows, delimiter=separator)]
    cells = [row for row in cells if len(row) >= 2]
    if not cells:
        return
    header, width = cells[0], max(map(len, cells))
    if len(header) == width - 1:  # R leaves out the name of the row names
        header = ["", *header]
        cells[0] = header
    columns = {i: [row[i] for row in cells[1:] if len(row) > i] or header[i : i + 1] for i in range(width)}
    ids, symbols = _named(header, ID_COLUMNS), _named(header, SYMBOL_COLUMNS)
    has_header = ids is not None or symbols is not None
    if ids is None:
        ids = next((i for i, values in columns.items() if i != symbols and looks_like_gene_ids(values)), None)
    if symbols is None and width == 2 and ids is not None:
        symbols = 1 - ids
    if ids is None or symbols is None:
        missing = "gene_id" if ids is None else "gene_symbol"
        raise ValueError(f"none of its columns {', '.join(header[:_PEEKED_LINES])} is named like {missing}")
    yield from ((row[ids], row[symbols]) for row in cells[has_header:] if len(row) > max(ids, symbols))


def _named(header: list[str], usual: Iterable[str]) -> int | None:
    """Return the position of the first usual name, in any case and with blanks or underscores."""
    names = [name.lower().replace(" ", "_") for name in header]
    return next((names.index(name.lower()) for name in usual if name.lower() in names), None)


def _pairs_of_h5ad(path: Path) -> Iterator[tuple[str, str]]:
    store = Store(path)
    for place in ("var", "raw/var"):
        if place in store:
            frame = open_metadata(store, place)
            yield from _pairs_of_frame(frame.rows(0, len(frame)))
    store.close()


def _pairs_of_frame(var: pd.DataFrame) -> Iterator[tuple[str, str]]:
    columns = {str(column): var[column] for column in var.columns} | {"": var.index.to_series()}
    usual = [column for column in (*ID_COLUMNS, "") if column in columns and looks_like_gene_ids(columns[column])]
    ids = next(iter(usual), None) or next((c for c, values in columns.items() if looks_like_gene_ids(values)), None)
    symbols = next((c for c in (*SYMBOL_COLUMNS, "") if c in columns and c != ids), None)
    if ids is not None and symbols is not None:
        yield from zip(map(str, columns[ids]), map(str, columns[symbols]), strict=True)
