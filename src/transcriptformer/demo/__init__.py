"""A small model trained on blood cells with `transcriptformer train`, evaluated on held-out cells."""
