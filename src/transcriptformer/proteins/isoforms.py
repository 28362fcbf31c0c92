"""Which proteins stand for a gene, and which sequences have to be embedded for that."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from transcriptformer.proteins.alphabet import count_unknown
from transcriptformer.proteins.fasta import Protein

ISOFORMS = FIRST, LONGEST, MEAN = "first", "longest", "mean"
"""Values of `--isoforms`."""


@dataclass(frozen=True)
class Proteome:
    """Proteins that stand for genes.

    Attributes
    ----------
    genes
        Ids, in the order in which they appear in the file.
    sequences
        What is to be embedded: residues, cut, each sequence once.
    gene_of_protein, sequence_of_protein
        For each protein that counts, the index of its gene, ascending, and of its sequence (proteins,).
    n_cut, n_replaced
        Proteins that were cut, and letters in them that become `<unk>`.
    """

    genes: list[str]
    sequences: list[str]
    gene_of_protein: np.ndarray
    sequence_of_protein: np.ndarray
    n_cut: int
    n_replaced: int

    @property
    def n_proteins(self) -> int:
        """How many proteins count."""
        return len(self.gene_of_protein)

    def gene_means(self, embeddings: np.ndarray) -> np.ndarray:
        """Mean over the proteins of each gene (genes, P), float32, from those of the sequences (sequences, P)."""
        of_gene = np.split(self.sequence_of_protein, np.flatnonzero(np.diff(self.gene_of_protein)) + 1)
        return np.stack([embeddings[rows].mean(axis=0, dtype=np.float64).astype(np.float32) for rows in of_gene])


def choose_isoforms(proteins: Iterable[Protein], isoforms: str, max_length: int) -> Proteome:
    """Take the first protein of each gene, its longest (the first of several), or all of them.

    Parameters
    ----------
    max_length
        Residues after which a protein is cut.
    """
    of_gene: dict[str, list[str]] = {}
    for gene, residues in proteins:
        chosen = of_gene.setdefault(gene, [])
        if isoforms == MEAN or not chosen:
            chosen.append(residues)
        elif isoforms == LONGEST and len(residues) > len(chosen[0]):
            chosen[0] = residues
    whole = [residues for chosen in of_gene.values() for residues in chosen]
    cut = [residues[:max_length] for residues in whole]
    index = {residues: i for i, residues in enumerate(dict.fromkeys(cut))}
    return Proteome(
        genes=list(of_gene),
        sequences=list(index),
        gene_of_protein=np.repeat(np.arange(len(of_gene)), [len(chosen) for chosen in of_gene.values()]),
        sequence_of_protein=np.array([index[residues] for residues in cut]),
        n_cut=sum(len(residues) > max_length for residues in whole),
        n_replaced=sum(map(count_unknown, cut)),
    )
