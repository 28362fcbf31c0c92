import pytest

from transcriptformer.data.species import likely_species


@pytest.mark.parametrize(
    ("gene_ids", "species"),
    [
        (["ENSG00000139618.19", "ENSG00000000003"], "homo_sapiens"),
        (["ENSMUSG00000024798", "ENSMUSG00000042385", "Gm123"], "mus_musculus"),
        (["FBgn0031208"], "drosophila_melanogaster"),
        (["WBGene00000001"], "caenorhabditis_elegans"),
        (["YAL001C", "YBR024W-A"], "saccharomyces_cerevisiae"),
        (["PF3D7_0100100"], "plasmodium_falciparum"),
        (["ENSXYZG00000000001"], None),
        (["TP53", "YWHAZ", "YES1"], None),
        (["ENSG00000139618", "TP53", "BRCA1"], None),
        ([], None),
    ],
)
def test_species_is_that_of_most_prefixes(gene_ids: list[str], species: str | None) -> None:
    assert likely_species(gene_ids) == species
