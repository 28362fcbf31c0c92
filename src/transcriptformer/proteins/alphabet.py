"""The tokens of ESM-2: one per letter of a protein, and a few special ones."""

import numpy as np

CLS, PAD, EOS, UNK = 0, 1, 2, 3
"""Start of a protein, nothing, end of a protein, a letter that is not in the alphabet."""

LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
"""Letters in the order of their tokens, the first of which is 4."""

N_TOKENS = 33
"""The last two are `<null_1>` and `<mask>`."""

_TOKEN_OF_BYTE = np.full(256, UNK, dtype=np.int64)
_TOKEN_OF_BYTE[np.frombuffer(LETTERS.encode(), np.uint8)] = np.arange(4, 4 + len(LETTERS))

_WITHOUT_KNOWN = str.maketrans("", "", LETTERS)


def tokenize(residues: str) -> np.ndarray:
    """Tokens (residues + 2,), int64: of every letter, between those of start and end."""
    letters = np.frombuffer(residues.encode("ascii", errors="replace"), np.uint8)
    return np.concatenate([[CLS], _TOKEN_OF_BYTE[letters], [EOS]])


def count_unknown(residues: str) -> int:
    """How many letters become `<unk>`, such as `*`, the stop codon."""
    return len(residues.translate(_WITHOUT_KNOWN))
