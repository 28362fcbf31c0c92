"""Files on disk: atomic writes, checksums, intermediate results, and the lock of a run."""
