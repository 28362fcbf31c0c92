"""Remote files come to disk: complete, verified, resumable."""
