import numpy as np
import pytest
from omegaconf import OmegaConf

from transcriptformer.config import shipped_file
from transcriptformer.data.species import SPECIES_OF_PREFIX, likely_species
from transcriptformer.data.tokenize import tokens_of_columns
from transcriptformer.errors import DataError
from transcriptformer.vocab import GeneVocab


@pytest.mark.parametrize(
    ("gene_ids", "species"),
    [
        (["ENSG00000139618.19", "ENSG00000000003"], "homo_sapiens"),
        (["ENSMUSG00000024798", "ENSMUSG00000042385", "Gm123"], "mus_musculus"),
        (["FBgn0031208"], "drosophila_melanogaster"),
        (["WBGene00000001"], "caenorhabditis_elegans"),
        (["YAL001C", "YBR024W-A"], "saccharomyces_cerevisiae"),
        (["GRCh38_ENSG00000139618", "hg19_ENSG00000000003.2"], "homo_sapiens"),
        (["mm10___ENSMUSG00000024798"], "mus_musculus"),
        (["PF3D7_0100100"], "plasmodium_falciparum"),
        (["ENSXYZG00000000001"], None),
        (["TP53", "YWHAZ", "YES1"], None),
        (["ENSG00000139618", "TP53", "BRCA1"], None),
        ([], None),
    ],
)
def test_species_is_that_of_most_prefixes(gene_ids: list[str], species: str | None) -> None:
    assert likely_species(gene_ids) == species


def test_embeddings_of_every_known_species_are_published() -> None:
    published = OmegaConf.load(shipped_file("protein_embeddings/ensembl.yaml"))
    assert set(SPECIES_OF_PREFIX.values()) <= set(OmegaConf.select(published, "species"))


@pytest.mark.parametrize(
    ("genes", "advice"),
    [
        (["ENSMUSG00000024798"], r"download all-embeddings', .* checkpoints/all_embeddings/mus_musculus_gene\.h5$"),
        (["ENSDARG00000024798"], r"--pretrained-embedding checkpoints/all_embeddings/danio_rerio_gene\.h5$"),
        (["ENSG00000000009"], r"\(homo_sapiens\).*; for a new species, add --pretrained-embedding$"),
        (["ENSXYZG00000000001"], "another species, .*; for a new species, add --pretrained-embedding$"),
    ],
)
def test_the_published_embeddings_of_another_species_are_named(genes: list[str], advice: str) -> None:
    vocab = GeneVocab(("unknown",), {"ENSG00000139618": 1})
    with pytest.raises(DataError, match=advice):
        tokens_of_columns(np.array(genes, object), vocab, True, "cells.h5ad")
