"""What gene ids look like, and the species that their prefix tells."""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice

import numpy as np
import pandas as pd
from scipy import sparse

SPECIES_OF_PREFIX = {
    "ENSG": "homo_sapiens",
    "ENSMUSG": "mus_musculus",
    "ENSDARG": "danio_rerio",
    "FBgn": "drosophila_melanogaster",
    "WBGene": "caenorhabditis_elegans",
    "ENSOCUG": "oryctolagus_cuniculus",
    "ENSGALG": "gallus_gallus",
    "ENSXETG": "xenopus_tropicalis",
    "ENSRNOG": "rattus_norvegicus",
    "ENSSSCG": "sus_scrofa",
    "ENSPTRG": "pan_troglodytes",
    "ENSGGOG": "gorilla_gorilla",
    "ENSMMUG": "macaca_mulatta",
    "ENSCJAG": "callithrix_jacchus",
    "ENSOANG": "ornithorhynchus_anatinus",
    "ENSMODG": "monodelphis_domestica",
    "ENSHGLG": "heterocephalus_glaber",
    "ENSPMAG": "petromyzon_marinus",
    "PF3D7_": "plasmodium_falciparum",
    "Y": "saccharomyces_cerevisiae",
}
"""Prefixes of stable ids at Ensembl, FlyBase, WormBase, PlasmoDB and the Saccharomyces Genome Database.

Protein embeddings of all these species are published.
"""

MIN_SHARE = 0.01
"""Fewer genes of a second species, such as those of a reporter, do not make a file one of two species."""

_GENE_ID = re.compile(r"(ENS[A-Z]*G|FBgn|WBGene)\d{6,}(\.\d+)?|(PF3D7_)\d{5,}(\.\d+)?|(Y)[A-P][LR]\d{3}[WC](-[A-Z])?")
"""Stable ids: letters before a number; for yeast, systematic names such as YAL001C."""

_WITH_GENOME = re.compile(f"(?:.*_)?(?:{_GENE_ID.pattern})")
"""Stable ids, possibly after the genome of a Cell Ranger reference (GRCh38_, mm10___)."""


def looks_like_gene_ids(values: Iterable[object]) -> bool:
    """Whether most of the first hundred `values` look like stable gene ids, such as ENSG00000139618.19."""
    first = [str(value) for value in islice(values, 100)]
    return sum(_GENE_ID.fullmatch(value) is not None for value in first) > len(first) / 2


def likely_species(gene_ids: Iterable[object]) -> str | None:
    """Return the species of the majority of the first thousand ids; None if there is no known majority."""
    first = list(map(species_of, islice(gene_ids, 1000)))
    found = Counter(species for species in first if species is not None)
    if not found:
        return None
    species, n = found.most_common(1)[0]
    return species if n > len(first) / 2 else None


def species_of(gene_id: object) -> str | None:
    """Return the species of a gene id, if its prefix is known."""
    match = _WITH_GENOME.match(str(gene_id))
    return SPECIES_OF_PREFIX.get(match[1] or match[3] or match[5]) if match else None


class SpeciesCounts:
    """Genes and counts of each species of a file, if it has several.

    Parameters
    ----------
    gene_ids
        Gene id of each column of counts (genes,).
    """

    def __init__(self, gene_ids: np.ndarray) -> None:
        self.codes, self.species = pd.factorize(np.array([*map(species_of, gene_ids), None], object))
        self.codes = self.codes[:-1]
        self.n_genes = np.bincount(self.codes[self.codes >= 0], minlength=len(self.species))
        self.is_mixed = int((self.n_genes >= MIN_SHARE * self.n_genes.sum()).sum()) > 1
        self.totals = np.zeros(len(self.species))

    def add(self, counts: sparse.csr_array) -> None:
        """Add the counts (cells, genes) of some cells."""
        if self.is_mixed:
            codes = self.codes.take(counts.indices)
            self.totals += np.bincount(codes + 1, weights=counts.data, minlength=len(self.species) + 1)[1:]

    def describe(self) -> str:
        """List the species with their genes and counts."""
        share = 100 * self.totals / max(1, self.totals.sum())
        parts = zip(self.species, self.n_genes, self.totals, share, strict=True)
        return ", ".join(f"{name} ({n} genes, {total:.0f} counts, {part:.1f} %)" for name, n, total, part in parts)
