"""Inference: compute and write the embeddings of cells."""
