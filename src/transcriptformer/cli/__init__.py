"""The command line: one thin module per command, each of which imports its work only when it runs."""
