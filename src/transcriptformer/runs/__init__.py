"""Runs over the cells of inputs: batches, several processes, resuming, and results in order, whatever is computed."""
