"""Realistic FASTA files."""

import gzip
from collections.abc import Iterable
from pathlib import Path

import numpy as np

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"

VERTEBRATE = (
    "ENSP00000369497.3 pep chromosome:GRCh38:13:32315508:32400268:1 gene:ENSG00000139618.19 "
    "transcript:ENST00000380152.8 gene_biotype:protein_coding transcript_biotype:protein_coding gene_symbol:BRCA2 "
    "description:BRCA2 DNA repair associated [Source:HGNC Symbol;Acc:HGNC:1101]"
)
METAZOA = (
    "FBpp0070000 pep primary_assembly:BDGP6.46:X:19961689:19968479:1 gene:FBgn0031081 transcript:FBtr0070000 "
    "gene_biotype:protein_coding transcript_biotype:protein_coding gene_symbol:Nep3"
)
WITHOUT_SYMBOL = (
    "ENSMUSP00000000001.5 pep chromosome:GRCm39:3:108014596:108053462:-1 gene:ENSMUSG00000000001.5 "
    "transcript:ENSMUST00000000001.5 gene_biotype:protein_coding transcript_biotype:protein_coding"
)
VERSIONLESS = (
    "YAL001C pep chromosome:R64-1-1:I:147594:151166:-1 gene:YAL001C transcript:YAL001C_mRNA "
    "gene_biotype:protein_coding transcript_biotype:protein_coding gene_symbol:TFC3"
)


def write_fasta(path: Path, records: Iterable[tuple[str, str]], line: int = 60) -> Path:
    """Write records, headers and sequences, in lines of 60 letters; gzipped if the name ends in .gz."""
    text = "".join(
        f">{header}\n" + "".join(f"{sequence[i : i + line]}\n" for i in range(0, len(sequence), line))
        for header, sequence in records
    )
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    return path


def random_protein(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list(AMINO_ACIDS), length))


def random_records(genes: Iterable[str], seed: int = 0, longest: int = 60) -> list[tuple[str, str]]:
    """Return a random protein for each gene, with headers in Ensembl's format."""
    rng = np.random.default_rng(seed)
    return [
        (
            f"P{i:05}.1 pep chromosome:X:1:1:1:1 gene:{gene}.3 transcript:T{i}",
            random_protein(rng, int(rng.integers(3, longest))),
        )
        for i, gene in enumerate(genes)
    ]
