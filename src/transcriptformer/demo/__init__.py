"""A small model trained on blood cells by `transcriptformer train`, and what it makes of cells it has not seen."""
