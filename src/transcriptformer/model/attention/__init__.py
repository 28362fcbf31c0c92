"""Expression-aware causal attention: its definition, and faster paths that agree with it."""
