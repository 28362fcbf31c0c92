"""Expression-aware causal attention: its definition, and two faster paths that agree with it."""
