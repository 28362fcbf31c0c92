"""Proteins of a FASTA file, and of which genes they are."""

import gzip
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO

from transcriptformer.errors import DataError, UsageError, one_line

logger = logging.getLogger(__name__)

GENE, GENE_SYMBOL = "gene", "gene_symbol"
"""Values of `--id-from` beside regular expressions."""

_GZIP_MAGIC = b"\x1f\x8b"

_NUCLEOTIDES = "ACGTUN"

_NUCLEOTIDE_SHARE = 0.9
"""Of the letters of DNA and RNA; proteins have about a quarter of such letters."""


class Protein(NamedTuple):
    """A record of the file: the gene it is of, and its residues in capital letters."""

    gene: str
    residues: str


def read_proteins(path: Path, id_from: str = GENE) -> list[Protein]:
    r"""All proteins of a FASTA file, plain or gzipped, in its order.

    Parameters
    ----------
    id_from
        Where a header tells the gene: `gene`, the field `gene:…` of Ensembl, without its version; `gene_symbol`, that
        field, or the former where there is none; or a regular expression with one group, such as `\[locus_tag=(\S+)\]`.

    Raises
    ------
    DataError
        If the file is missing, truncated, empty, no FASTA or of nucleotides, or if a header lacks the gene's id, a
        protein is there twice or has no residues.
    UsageError
        If `id_from` is no such expression, or the package that reads FASTA is not installed.
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
                raise DataError(f"{where}: no gene id ({_expected(id_from)}); --id-from says where else it is")
            if "/" in gene or gene == ".":
                raise DataError(f"{where}: the gene id {gene!r} cannot be a name in an HDF5 file; see --id-from")
            if not sequence:
                raise DataError(f"{where}: no residues")
            if name in seen:
                raise DataError(f"{where}: the protein {name} is there twice, first as record {seen[name]}")
            seen[name] = number
            full_ids.setdefault(gene, {})[_field(header, "gene") or gene] = None
            proteins.append(Protein(gene, sequence.upper()))
    if not proteins:
        raise DataError(f"{path}: empty, there is no protein in it")
    _refuse_nucleotides(path, proteins)
    _warn_about_dots(path, proteins)
    _warn_about_shared_ids(path, full_ids)
    return proteins


@contextmanager
def _open_fasta(path: Path) -> Iterator[TextIO]:
    """The file as text, and in one line what is wrong with it."""
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == _GZIP_MAGIC
        if is_gzip:
            _check_gzip(path)
        # Headers may hold names of people and places in any encoding; they are not what is read.
        with (gzip.open if is_gzip else open)(path, "rt", encoding="utf-8", errors="replace") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated or damaged ({one_line(error)}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _check_gzip(path: Path) -> None:
    """Read it once to its end, where its checksum is, so that damage is not taken for odd proteins."""
    with gzip.open(path) as file:
        while file.read(2**20):
            pass


def _records(file: TextIO, path: Path) -> Iterator[tuple[str, str]]:
    """Header and sequence of each record."""
    try:
        from Bio.SeqIO.FastaIO import SimpleFastaParser
    except ImportError as error:
        raise missing_extra(error) from error
    # The parser would skip whatever comes before the first record.
    first = next((line for line in file if line.strip()), "")
    if not first:
        return
    if not first.startswith(">"):
        raise DataError(f"{path}: not FASTA, which begins with '>'")
    yield from SimpleFastaParser(chain([first], file))


def missing_extra(error: ImportError) -> UsageError:
    """What to say where a package is not installed that only protein embeddings need."""
    return UsageError(
        f'protein embeddings need a package that is not installed ({one_line(error)}); pip install "transcriptformer'
        '[proteins]" brings it'
    )


def _gene_reader(id_from: str) -> Callable[[str], str | None]:
    """A function from header to gene id."""
    if id_from in (GENE, GENE_SYMBOL):
        return _symbol_or_gene if id_from == GENE_SYMBOL else _gene
    try:
        pattern = re.compile(id_from)
    except re.error as error:
        raise UsageError(f"--id-from {id_from!r}: not a regular expression ({error})") from error
    if pattern.groups != 1:
        raise UsageError(
            f"--id-from {id_from!r}: {GENE}, {GENE_SYMBOL} or a regular expression with one group, the gene's id in "
            f"parentheses; this has {pattern.groups}"
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
    return gene.partition(".")[0] if gene else None  # as `inference` reads the ids of cells


def _symbol_or_gene(header: str) -> str | None:
    return _field(header, "gene_symbol") or _gene(header)


def _expected(id_from: str) -> str:
    return "gene:…" if id_from in (GENE, GENE_SYMBOL) else f"nothing fits {id_from}"


def _refuse_nucleotides(path: Path, proteins: list[Protein]) -> None:
    n_letters = sum(len(protein.residues) for protein in proteins)
    n_nucleotides = sum(protein.residues.count(letter) for protein in proteins for letter in _NUCLEOTIDES)
    if n_nucleotides > _NUCLEOTIDE_SHARE * n_letters:
        raise DataError(
            f"{path}: DNA or RNA, not proteins: {100 * n_nucleotides / n_letters:.0f} % of the letters are of those; "
            "Ensembl has proteins in files that end in .pep.all.fa.gz"
        )


def _warn_about_dots(path: Path, proteins: list[Protein]) -> None:
    with_dots = dict.fromkeys(protein.gene for protein in proteins if "." in protein.gene)
    if with_dots:
        logger.warning(
            "%s: %d gene ids hold a dot, such as %s; `inference` reads ids of cells up to the first dot, and will not "
            "find these",
            *(path, len(with_dots), next(iter(with_dots))),
        )


def _warn_about_shared_ids(path: Path, full_ids: dict[str, dict[str, None]]) -> None:
    """Tell of genes that differ only behind the dot, or have the same symbol."""
    shared = {gene: list(full) for gene, full in full_ids.items() if len(full) > 1}
    if shared:
        gene, full = next(iter(shared.items()))
        logger.warning(
            "%s: %d ids stand for several genes each, which are taken for one: %s for %s and %s",
            *(path, len(shared), gene, full[0], full[1]),
        )
