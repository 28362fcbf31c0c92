"""How the processes of a run begin, how they end, and what they know of each other."""
