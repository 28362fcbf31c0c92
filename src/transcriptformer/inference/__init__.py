"""Cells in, embeddings out."""
