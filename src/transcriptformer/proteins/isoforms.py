"""Choose the isoforms that represent each gene, and deduplicate their sequences."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from transcriptformer.proteins.alphabet import count_unknown
from transcriptformer.proteins.fasta import Protein

ISOFORMS = FIRST, LONGEST, MEAN = "first", "longest", "mean"
"""Values of `--isoforms`."""


@dataclass(frozen=True)
class Proteome:
    """The proteins that represent the genes of a species.

    Attributes
    ----------
    genes
        Gene ids, in file order.
    sequences
        Sequences to embed, truncated and unique.
    gene_of_protein, sequence_of_protein
        Index of each chosen protein's gene, ascending, and of its sequence (proteins,).
    n_cut, n_replaced
        Number of truncated proteins, and of letters that become `<unk>`.
    """

    genes: list[str]
    sequences: list[str]
    gene_of_protein: np.ndarray
    sequence_of_protein: np.ndarray
    n_cut: int
    n_replaced: int

    @property
    def n_proteins(self) -> int:
        """Number of chosen proteins."""
        return len(self.gene_of_protein)

    def gene_means(self, embeddings: np.ndarray) -> np.ndarray:
        """Average the embeddings of sequences (sequences, P) over the proteins of each gene (genes, P), float32."""
        of_gene = np.split(self.sequence_of_protein, np.flatnonzero(np.diff(self.gene_of_protein)) + 1)
        return np.stack([embeddings[rows].mean(axis=0, dtype=np.float64).astype(np.float32) for rows in of_gene])


def choose_isoforms(proteins: Iterable[Protein], isoforms: str, max_length: int) -> Proteome:
    """Choose the first protein of each gene, the longest (the first on ties), or all of them.

    Parameters
    ----------
    max_length
        Number of residues at which proteins are truncated.
    """
    of_gene: dict[str, list[str]] = {}
    for gene, residues in proteins:
        chosen = of_gene.setdefault(gene, [])
        if isoforms == MEAN or not chosen:
            chosen.append(residues)
        elif isoforms == LONGEST and len(residues) > len(chosen[0]):
            chosen[0] = residues
    full = [residues for chosen in of_gene.values() for residues in chosen]
    cut = [residues[:max_length] for residues in full]
    index = {residues: i for i, residues in enumerate(dict.fromkeys(cut))}
    return Proteome(
        genes=list(of_gene),
        sequences=list(index),
        gene_of_protein=np.repeat(np.arange(len(of_gene)), [len(chosen) for chosen in of_gene.values()]),
        sequence_of_protein=np.array([index[residues] for residues in cut]),
        n_cut=sum(len(residues) > max_length for residues in full),
        n_replaced=sum(map(count_unknown, cut)),
    )
