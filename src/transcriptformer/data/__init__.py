"""The data pipeline, from count matrices to batches of tokens."""
