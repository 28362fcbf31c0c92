"""The command line: one thin module per command, which imports heavy modules only when the command runs."""
