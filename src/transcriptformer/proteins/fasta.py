"""Read proteins and their gene ids from FASTA files."""

import gzip
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from transcriptformer.data.genes import resolve
from transcriptformer.errors import DataError, UsageError, one_line

logger = logging.getLogger(__name__)

GENE, GENE_SYMBOL = "gene", "gene_symbol"
"""Values of `--id-from` besides regular expressions."""

_GZIP_MAGIC = b"\x1f\x8b"

_NUCLEOTIDES = "ACGTUN"

_MAX_NUCLEOTIDE_SHARE = 0.9
"""Share of nucleotide letters above which a file is DNA or RNA; proteins have about a quarter."""


class Protein(NamedTuple):
    """A FASTA record: its gene id and its residues in upper case."""

    gene: str
    residues: str


def read_proteins(path: Path, id_from: str = GENE) -> list[Protein]:
    r"""Read all proteins of a FASTA file, plain or gzipped, in file order.

    Parameters
    ----------
    id_from
        How to find the gene id in a header: `gene`, Ensembl's field `gene:…` without the version of a stable id;
        `gene_symbol`, that field, or `gene` if it is missing; or a regular expression with one group, such as
        `\[locus_tag=(\S+)\]`.

    Raises
    ------
    DataError
        If the file is missing, truncated, empty, not FASTA or holds nucleotides, or if a header has no gene id, or a
        protein is duplicated or has no residues.
    UsageError
        If `id_from` is not a regular expression with one group.
    """
    gene_of = _gene_reader(id_from)
    proteins: list[Protein] = []
    seen: dict[str, int] = {}
    full_ids: dict[str, dict[str, None]] = {}
    with _open_fasta(path) as file:
        for number, (header, sequence) in enumerate(_records(file, path), start=1):
            name = header.partition(" ")[0]
            gene = gene_of(header)
            where = f"{path}: record {number}, '>{header[:80]}'"
            if not gene:
                raise DataError(f"{where}: no gene id ({_expected(id_from)}); set --id-from to where it is")
            if "/" in gene or gene == ".":
                raise DataError(f"{where}: the gene id {gene!r} is not a valid HDF5 name; use another --id-from")
            if not sequence:
                raise DataError(f"{where}: no residues")
            if name in seen:
                raise DataError(f"{where}: duplicate of protein {name} in record {seen[name]}")
            seen[name] = number
            full_ids.setdefault(gene, {})[_field(header, "gene") or gene] = None
            proteins.append(Protein(gene, sequence.upper()))
    if not proteins:
        raise DataError(f"{path}: no proteins in the file")
    _refuse_nucleotides(path, proteins)
    _warn_about_shared_ids(path, full_ids)
    return proteins


@contextmanager
def _open_fasta(path: Path) -> Iterator[TextIO]:
    """Open the file as text, with errors translated to DataError."""
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == _GZIP_MAGIC
        if is_gzip:
            _check_gzip(path)
        # Descriptions in headers may be in any encoding; gene ids and residues are ASCII.
        with (gzip.open if is_gzip else open)(path, "rt", encoding="utf-8", errors="replace") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated or damaged ({one_line(error)}); download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _check_gzip(path: Path) -> None:
    """Verify the checksum, which is at the end, so that damage is not parsed as proteins."""
    with gzip.open(path) as file:
        while file.read(2**20):
            pass


def _records(file: TextIO, path: Path) -> Iterator[tuple[str, str]]:
    """Yield the header and the sequence of each record."""
    header: str | None = None
    lines: list[str] = []
    for line in file:
        if line.startswith(">"):
            if header is not None:
                yield header, "".join(lines)
            header, lines = line[1:].rstrip(), []
        elif header is not None:
            lines.append("".join(line.split()))
        elif line.strip():
            raise DataError(f"{path}: not FASTA, which starts with '>'")
    if header is not None:
        yield header, "".join(lines)


def _gene_reader(id_from: str) -> Callable[[str], str | None]:
    """Return a function that finds the gene id in a header."""
    if id_from in (GENE, GENE_SYMBOL):
        return _symbol_or_gene if id_from == GENE_SYMBOL else _gene
    try:
        pattern = re.compile(id_from)
    except re.error as error:
        raise UsageError(f"--id-from {id_from!r}: not a regular expression ({error})") from error
    if pattern.groups != 1:
        raise UsageError(
            f"--id-from {id_from!r}: {pattern.groups} groups; use {GENE}, {GENE_SYMBOL} or a regular expression with "
            "one group, which matches the gene id"
        )

    def search(header: str) -> str | None:
        match = pattern.search(header)
        return match[1] if match else None

    return search


def _field(header: str, name: str) -> str | None:
    match = re.search(rf"(?:^|\s){name}:(\S+)", header)
    return match[1] if match else None


def _gene(header: str) -> str | None:
    gene = _field(header, "gene")
    return resolve([gene], None)[0] if gene else None  # as `inference` does with the gene ids in `var`


def _symbol_or_gene(header: str) -> str | None:
    return _field(header, "gene_symbol") or _gene(header)


def _expected(id_from: str) -> str:
    return "expected gene:…" if id_from in (GENE, GENE_SYMBOL) else f"no match for {id_from}"


def _refuse_nucleotides(path: Path, proteins: list[Protein]) -> None:
    n_letters = sum(len(protein.residues) for protein in proteins)
    n_nucleotides = sum(protein.residues.count(letter) for protein in proteins for letter in _NUCLEOTIDES)
    if n_nucleotides > _MAX_NUCLEOTIDE_SHARE * n_letters:
        raise DataError(
            f"{path}: DNA or RNA, not proteins: {100 * n_nucleotides / n_letters:.0f} % of letters are nucleotides; "
            "use the proteins, on Ensembl the file that ends in .pep.all.fa.gz"
        )


def _warn_about_shared_ids(path: Path, full_ids: dict[str, dict[str, None]]) -> None:
    """Warn about genes that share an id, such as a symbol."""
    shared = {gene: list(full) for gene, full in full_ids.items() if len(full) > 1}
    if shared:
        gene, full = next(iter(shared.items()))
        logger.warning(
            "%s: %d gene ids are ambiguous, and their genes are merged: %s stands for %s and %s",
            *(path, len(shared), gene, full[0], full[1]),
        )
