"""The ESM-2 vocabulary: one token per residue letter, and special tokens."""

import numpy as np

CLS, PAD, EOS, UNK = 0, 1, 2, 3
"""Special tokens: start of a protein, padding, end of a protein, unknown letter."""

LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
"""Letters in token order; the first token is 4."""

N_TOKENS = 33
"""Size of the vocabulary; the last two tokens are `<null_1>` and `<mask>`."""

_TOKEN_OF_BYTE = np.full(256, UNK, dtype=np.int64)
_TOKEN_OF_BYTE[np.frombuffer(LETTERS.encode(), np.uint8)] = np.arange(4, 4 + len(LETTERS))

_DROP_KNOWN = str.maketrans("", "", LETTERS)


def tokenize(residues: str) -> np.ndarray:
    """Return the tokens of a protein (residues + 2,), int64, with start and end tokens."""
    letters = np.frombuffer(residues.encode("ascii", errors="replace"), np.uint8)
    return np.concatenate([[CLS], _TOKEN_OF_BYTE[letters], [EOS]])


def count_unknown(residues: str) -> int:
    """Count the letters that become `<unk>`, such as `*`, the stop codon."""
    return len(residues.translate(_DROP_KNOWN))
