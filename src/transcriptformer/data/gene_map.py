"""Maps of gene symbols to gene ids: the shipped ones, and those read from files."""

import gzip
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
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
        return {Path(file).name: read_symbol_map(Path(file))}
    return {f"the shipped map of {species}": _read_shipped(species) for species in SHIPPED}


def read_symbol_map(path: Path) -> SymbolMap:
    """Read pairs of gene ids and symbols from a table, a GTF, FASTA headers or an h5ad with both in `var`."""
    if not path.is_file():
        raise UsageError(f"{OPTION} {path}: no such file")
    try:
        pairs = _pairs_of_h5ad(path) if h5py.is_hdf5(path) else _pairs_of_text(_lines(path))
        found = _collect(pairs)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{OPTION} {path}: cannot be read ({one_line(error)})") from error
    if not found:
        raise DataError(
            f"{OPTION} {path}: no pairs of gene ids and symbols; give a table with both in two columns, a GTF, a "
            "protein FASTA of Ensembl, or an h5ad with both in var"
        )
    return found


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
    rows = [line for line in lines if line and not line.startswith("#")]
    if any(line.startswith(">") for line in rows[:1]):
        fields = (dict(_FASTA_FIELD.findall(line)) for line in rows if line.startswith(">"))
        yield from ((found["gene"], found["gene_symbol"]) for found in fields if len(found) == 2)
    elif any('gene_id "' in line for line in rows[:100]):
        fields = (dict(_GTF_FIELD.findall(line)) for line in rows if "\tgene\t" in line or "\ttranscript\t" in line)
        yield from ((found["gene_id"], found["gene_name"]) for found in fields if len(found) == 2)
    else:
        yield from _pairs_of_table(rows)


def _pairs_of_table(rows: list[str]) -> Iterator[tuple[str, str]]:
    separator = "\t" if any("\t" in row for row in rows[:10]) else ","
    cells = [[cell.strip().strip('"') for cell in row.split(separator)] for row in rows]
    cells = [row for row in cells if len(row) >= 2]
    header, width = (cells[0] if cells else []), max(map(len, cells), default=0)
    columns = {i: [row[i] for row in cells[1:] if len(row) > i] for i in range(width)}
    ids = next((i for i, name in enumerate(header) if name in ID_COLUMNS), None)
    symbols = next((i for i, name in enumerate(header) if name in SYMBOL_COLUMNS), None)
    if ids is None:
        ids = next((i for i, values in columns.items() if looks_like_gene_ids(values or header[i : i + 1])), 0)
    if symbols is None:
        symbols = next((i for i in columns if i != ids), None)
    is_header = bool({*ID_COLUMNS, *SYMBOL_COLUMNS} & set(header))
    if symbols is not None:
        yield from ((row[ids], row[symbols]) for row in cells[is_header:] if len(row) > max(ids, symbols))


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
