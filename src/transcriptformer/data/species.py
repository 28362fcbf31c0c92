"""What gene ids look like, and the species that their prefix tells."""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice

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
"""Prefixes of stable ids at Ensembl, FlyBase, WormBase, PlasmoDB and the Saccharomyces Genome Database."""

_GENE_ID = re.compile(r"(ENS[A-Z]*G|FBgn|WBGene)\d{6,}(\.\d+)?|(PF3D7_)\d{5,}(\.\d+)?|(Y)[A-P][LR]\d{3}[WC](-[A-Z])?")
"""Stable ids: letters before a number; for yeast, systematic names such as YAL001C."""


def looks_like_gene_ids(values: Iterable[object]) -> bool:
    """Whether most of the first hundred `values` look like stable gene ids, such as ENSG00000139618.19."""
    first = [str(value) for value in islice(values, 100)]
    return sum(_GENE_ID.fullmatch(value) is not None for value in first) > len(first) / 2


def likely_species(gene_ids: Iterable[object]) -> str | None:
    """Return the species of the majority of the first thousand ids; None if there is no known majority."""
    first = [str(gene) for gene in islice(gene_ids, 1000)]
    found = Counter(match[1] or match[3] or match[5] for match in map(_GENE_ID.match, first) if match)
    if not found:
        return None
    prefix, n = found.most_common(1)[0]
    return SPECIES_OF_PREFIX.get(prefix) if n > len(first) / 2 else None
