"""Questions to the generative model: prompts, probabilities of genes, new cells."""
