"""Expression-aware causal attention: its definition and two faster implementations."""
