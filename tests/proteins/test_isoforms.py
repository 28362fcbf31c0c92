"""The choice of isoforms, and their deduplicated sequences."""

import numpy as np

from transcriptformer.proteins.fasta import Protein
from transcriptformer.proteins.isoforms import choose_isoforms

PROTEINS = [
    Protein("B", "MKV"),
    Protein("A", "MM*J"),
    Protein("B", "MKVLA"),
    Protein("C", "MKVLA"),
    Protein("B", "GGGGG"),
    Protein("A", "MK"),
]


def chosen(isoforms: str, max_length: int = 1022) -> dict[str, list[str]]:
    proteome = choose_isoforms(PROTEINS, isoforms, max_length)
    found: dict[str, list[str]] = {gene: [] for gene in proteome.genes}
    for gene, sequence in zip(proteome.gene_of_protein, proteome.sequence_of_protein, strict=True):
        found[proteome.genes[gene]].append(proteome.sequences[sequence])
    return found


def test_first_chooses_the_first_protein_of_each_gene_in_file_order() -> None:
    assert list(chosen("first").items()) == [("B", ["MKV"]), ("A", ["MM*J"]), ("C", ["MKVLA"])]


def test_longest_chooses_the_first_of_the_longest_proteins() -> None:
    assert list(chosen("longest").items()) == [("B", ["MKVLA"]), ("A", ["MM*J"]), ("C", ["MKVLA"])]


def test_mean_chooses_all_proteins() -> None:
    assert chosen("mean") == {"B": ["MKV", "MKVLA", "GGGGG"], "A": ["MM*J", "MK"], "C": ["MKVLA"]}


def test_identical_sequences_are_embedded_once() -> None:
    proteome = choose_isoforms(PROTEINS, "mean", 1022)
    assert sorted(proteome.sequences) == ["GGGGG", "MK", "MKV", "MKVLA", "MM*J"]
    assert proteome.n_proteins == 6


def test_proteins_are_truncated_before_unknown_letters_are_counted() -> None:
    proteome = choose_isoforms(PROTEINS, "longest", 3)
    assert proteome.sequences == ["MKV", "MM*"]
    assert (proteome.n_cut, proteome.n_replaced) == (3, 1)
    assert (choose_isoforms(PROTEINS, "first", 4).n_cut, choose_isoforms(PROTEINS, "first", 4).n_replaced) == (1, 2)


def test_the_longest_protein_is_chosen_before_truncation() -> None:
    assert chosen("longest", 3)["B"] == ["MKV"]
    longer = [Protein("A", "MKV"), Protein("A", "GGGGG")]
    assert choose_isoforms(longer, "longest", 3).sequences == ["GGG"]


def test_means_weight_identical_proteins_of_a_gene_by_their_number() -> None:
    twice = [*PROTEINS, Protein("C", "MKVLA"), Protein("C", "MK")]
    proteome = choose_isoforms(twice, "mean", 1022)
    embeddings = np.random.default_rng(0).standard_normal((len(proteome.sequences), 4), np.float32)
    of = {sequence: embeddings[i].astype(np.float64) for i, sequence in enumerate(proteome.sequences)}
    means = proteome.gene_means(embeddings)
    assert means.dtype == np.float32
    expected = [
        (of["MKV"] + of["MKVLA"] + of["GGGGG"]) / 3,
        (of["MM*J"] + of["MK"]) / 2,
        (2 * of["MKVLA"] + of["MK"]) / 3,
    ]
    np.testing.assert_allclose(means, expected, rtol=1e-6)


def test_the_mean_of_one_protein_is_its_embedding() -> None:
    proteome = choose_isoforms(PROTEINS, "longest", 1022)
    embeddings = np.random.default_rng(0).standard_normal((len(proteome.sequences), 4), np.float32)
    np.testing.assert_array_equal(proteome.gene_means(embeddings), embeddings[[0, 1, 0]])
