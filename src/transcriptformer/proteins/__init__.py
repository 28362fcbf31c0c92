"""Protein embeddings of a species: a FASTA file is embedded with ESM-2 and saved as `<species>_gene.h5`."""
