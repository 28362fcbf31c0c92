"""Which gene each column of counts stands for: the column of `var` that names them, and in which spelling."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pandas as pd

from transcriptformer.data.species import looks_like_gene_ids

INDEX, AUTO = "index", "auto"
"""Values of `gene_col_name` besides column names."""

ID_COLUMNS = (
    *("ensembl_id", "feature_id", "gene_ids", "gene_id", "ensembl_ids", "ensembl_gene_id", "ensembl_gene_ids"),
    *("gene_stable_id", "ensembl", "Ensembl", "ENSEMBL", "Accession", "accession"),
)
"""Usual names of columns with gene ids, in order of preference."""

SYMBOL_COLUMNS = (
    *("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "symbol", "symbols", "Gene", "gene"),
    *("gene_short_name", "features", "feature", "name", "hgnc_symbol", "mgi_symbol"),
)
"""Usual names of columns with gene symbols, in order of preference."""

_MISSING = {"", "nan", "none", "na", "<na>", "null", "n/a"}
"""Values, in lower case, that stand for a missing id."""

_STABLE_ID = re.compile(r"(?:.*_)?(ENS[A-Z]*G\d{6,}|FBgn\d{6,}|WBGene\d{6,})(?:\.\d+)?", re.IGNORECASE)
"""A stable id in any case, after the genome of a Cell Ranger reference (GRCh38_, mm10___), and before a version."""

_PAR_Y = "_PAR_Y"

_FULL_COVERAGE = 0.9
"""Share of known ids above which symbols are not looked up."""

_SAMPLE = 500
"""Values that tell whether a column may hold gene ids."""

_MAX_LISTED = 5


@dataclass(frozen=True)
class Symbols:
    """Outcome of mapping symbols to gene ids.

    Attributes
    ----------
    source
        Where the map comes from.
    n_mapped
        Number of columns whose symbol stands for one gene.
    unknown, ambiguous
        Symbols that stand for no gene of the map, and for several.
    n_known_before
        Number of genes of the vocabulary that are known without the map.
    """

    source: str
    n_mapped: int
    unknown: tuple[str, ...] = ()
    ambiguous: tuple[str, ...] = ()
    n_known_before: int = 0

    def describe(self) -> str:
        """Summarize the outcome in one line."""
        text = f"{self.n_mapped} symbols mapped to gene ids by {self.source}"
        for kind, names in (("unknown", self.unknown), ("ambiguous", self.ambiguous)):
            if names:
                more = ", …" if len(names) > _MAX_LISTED else ""
                text += f"; {len(names)} {kind}, left out: {', '.join(names[:_MAX_LISTED])}{more}"
        return text


@dataclass(frozen=True)
class Genes:
    """Gene of each column of counts.

    Attributes
    ----------
    ids
        Gene ids (genes,), in the vocabulary's spelling where they are known; empty if missing or left out.
    column
        Column of `var`; None: its index.
    n_known
        Number of different genes of the vocabulary; None without a vocabulary.
    n_respelled
        Number of ids that are known in another spelling: without version, blanks or genome, or in another case.
    n_par_y
        Number of ids of pseudoautosomal genes on Y (`…_PAR_Y`), which are other columns than their copies on X.
    symbols
        Outcome of mapping symbols, if the column holds symbols.
    """

    ids: np.ndarray
    column: str | None
    n_known: int | None = None
    n_respelled: int = 0
    n_par_y: int = 0
    symbols: Symbols | None = None

    def describe(self) -> str:
        """Describe where the ids come from."""
        place = "the index of var" if self.column is None else f"var[{self.column!r}]"
        notes = [
            f"{self.n_respelled} ids matched after removing versions, blanks or genomes" if self.n_respelled else "",
            f"{self.n_par_y} copies on Y (…_PAR_Y) left out" if self.n_par_y else "",
        ]
        details = "".join(f"; {note}" for note in notes if note)
        if self.symbols is not None:
            return f"gene symbols from {place}: {self.symbols.describe()}{details}"
        return f"gene ids from {place}{details}"


SymbolMap = Mapping[str, tuple[str, ...]]
"""Gene ids of each symbol; several if it is ambiguous."""


def resolve(values: Iterable[object], known: Container[str] | None) -> list[str]:
    """Return the gene id that each value stands for, in the spelling of the vocabulary.

    A value that is in the vocabulary stands for itself. Otherwise, a version (`.19`), a genome (`GRCh38_`) and another
    case are removed from stable ids of Ensembl, FlyBase and WormBase, if the vocabulary then knows them. Dots in other
    ids, such as Aqu2.1.00123, are part of them.

    Parameters
    ----------
    known
        Ids in the vocabulary; None: unknown, and versions of stable ids are removed.

    Returns
    -------
    Ids; empty for missing values, and unknown ones without surrounding blanks.
    """
    return [_resolve_one(value, known) for value in values]


def _resolve_one(value: object, known: Container[str] | None) -> str:
    if known is not None and isinstance(value, str) and value in known:
        return value
    name = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    name = name.strip()
    if name.lower() in _MISSING:
        return ""
    if known is not None and name in known:
        return name
    match = _STABLE_ID.fullmatch(name)
    if match is None:
        return name
    found = _canonical(match[1])
    return found if known is None or found in known else name


def _canonical(stable_id: str) -> str:
    """Return a stable id in its usual case."""
    for prefix in ("FBgn", "WBGene"):
        if stable_id.lower().startswith(prefix.lower()):
            return prefix + stable_id[len(prefix) :]
    return stable_id.upper()


def find_genes(
    var: pd.DataFrame,
    wanted: str,
    known: Collection[str] | None,
    load_maps: Callable[[], Mapping[str, SymbolMap]] = dict,
) -> Genes | None:
    """Find the genes that the columns of counts stand for.

    Parameters
    ----------
    var
        Metadata of the columns of counts.
    wanted
        Column of `var`, or `index`; `auto`: the column that covers most genes of the vocabulary, the first on ties.
    known
        Ids in the vocabulary; None: columns are compared by how many values look like stable ids.
    load_maps
        Returns maps of symbols by name of their source; called if few ids are known.

    Returns
    -------
    The genes, or None if `var` has no such column, or `auto` finds none.
    """
    candidates = dict(_candidates(var)) if wanted == AUTO else _named_column(var, wanted)
    by_id = [_by_id(column, values, known) for column, values in candidates.items()]
    best = max(by_id, key=_coverage, default=None)
    if wanted == AUTO and known is None and best is not None and not looks_like_gene_ids(best.ids):
        best = next((genes for genes in by_id if genes.column in ID_COLUMNS), best)
    if known is None or best is None or _coverage(best) >= _FULL_COVERAGE * min(len(var), len(known)):
        return best
    symbols = [
        _by_symbol(genes.column, candidates[genes.column], known, source, symbol_map)
        for source, symbol_map in load_maps().items()
        for genes in by_id
    ]
    mapped = max(symbols, key=_coverage, default=best)
    # Ids are exact; symbols only help where they name genes without an id, or where there are hardly any ids.
    factor = 1 if mapped.column == best.column else 2
    if mapped.symbols is None or _coverage(mapped) <= factor * _coverage(best):
        return best
    return replace(mapped, symbols=replace(mapped.symbols, n_known_before=_coverage(best)))


def _coverage(genes: Genes) -> int:
    return genes.n_known or 0


def _named_column(var: pd.DataFrame, wanted: str) -> dict[str | None, pd.Series | pd.Index]:
    if wanted in var.columns:
        return {wanted: var[wanted]}
    return {None: var.index} if wanted in (INDEX, var.index.name) else {}


def _candidates(var: pd.DataFrame) -> Iterator[tuple[str | None, pd.Series | pd.Index]]:
    """Yield the columns that may name genes: usual id columns, the index, usual symbol columns, then other text."""
    columns = [str(column) for column in var.columns if isinstance(column, str) and not _is_repeated(var, column)]
    yield from ((column, var[column]) for column in ID_COLUMNS if column in columns)
    yield None, var.index
    yield from ((column, var[column]) for column in SYMBOL_COLUMNS if column in columns)
    others = [column for column in columns if column not in ID_COLUMNS and column not in SYMBOL_COLUMNS]
    yield from ((column, var[column]) for column in others if _is_text(var[column]))


def _is_repeated(var: pd.DataFrame, column: str) -> bool:
    return isinstance(var[column], pd.DataFrame)


def _is_text(values: pd.Series) -> bool:
    first = [value for value in islice(values, _SAMPLE) if isinstance(value, str)]
    return len(set(first)) > len(values[:_SAMPLE]) / 2


def _texts(values: pd.Series | pd.Index) -> list[object]:
    """Return values as objects; empty text if missing."""
    objects = values.astype(object)
    return list(np.where(objects.isna(), "", objects))


def _by_id(column: str | None, values: pd.Series | pd.Index, known: Container[str] | None) -> Genes:
    texts = _texts(values)
    ids = resolve(texts, known)
    if known is None:
        return Genes(np.array(ids, dtype=object), column, n_known=sum(map(bool, map(_STABLE_ID.fullmatch, ids))))
    respelled = sum(isinstance(old, str) and new != old and new in known for new, old in zip(ids, texts, strict=True))
    n_known = len({gene for gene in ids if gene in known})
    return Genes(np.array(ids, dtype=object), column, n_known, respelled, sum(gene.endswith(_PAR_Y) for gene in ids))


def _by_symbol(
    column: str | None, values: pd.Series | pd.Index, known: Container[str], source: str, symbol_map: SymbolMap
) -> Genes:
    """Map symbols to ids; values that are ids already stay."""
    ids, unknown, ambiguous = [], Counter[str](), Counter[str]()
    n_mapped = 0
    for name in resolve(_texts(values), known):
        found = (name,) if name == "" or name in known else symbol_map.get(name, ())
        ids.append(found[0] if len(found) == 1 else "")
        if len(found) == 1 and name not in known and name:
            n_mapped += 1
        elif len(found) != 1:
            (ambiguous if found else unknown)[name] += 1
    symbols = Symbols(source, n_mapped, tuple(unknown), tuple(ambiguous))
    n_known = len({gene for gene in ids if gene in known})
    return Genes(np.array(ids, dtype=object), column, n_known, symbols=symbols)
