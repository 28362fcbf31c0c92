"""Protein embeddings of a species: from a FASTA file, through ESM-2, to `<species>_gene.h5`."""
