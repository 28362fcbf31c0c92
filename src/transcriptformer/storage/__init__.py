"""Files on disk: atomic writes, checksums, intermediate results and run locks."""
