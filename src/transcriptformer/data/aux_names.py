"""Entries of auxiliary vocabularies that values of `obs` stand for, in another spelling or as ontology terms."""

import difflib
import re

from transcriptformer.data.assays import ASSAY_OF_TERM
from transcriptformer.vocab import AuxVocab

TERM_SUFFIX = "_ontology_term_id"
"""Ending of columns with the ontology terms of another column, in the CELLxGENE schema."""

NAME_OF_TERM = {"assay": ASSAY_OF_TERM}
"""Names of ontology terms, per column."""

_TERM = re.compile(r"(?:https?://\S*/)?([A-Z]+)[:_](\d+)", re.IGNORECASE)
"""Ontology terms: EFO:0009922, EFO_0009922, http://www.ebi.ac.uk/efo/EFO_0009922."""

_PLAIN = str.maketrans(dict.fromkeys("‘’‛`´′ʹʼ＇", "'") | dict.fromkeys("‐‑‒–—―−﹣－", "-"))  # noqa: RUF001


def fold(value: str) -> str:
    """Return a spelling without differences in case, blanks, quotes and dashes."""
    return " ".join(value.translate(_PLAIN).casefold().split())


class AuxNames:
    """Finds the entry of an auxiliary vocabulary that a value stands for.

    Parameters
    ----------
    vocab
        Vocabulary of a column.
    """

    def __init__(self, vocab: AuxVocab) -> None:
        self.vocab = vocab
        self.name_of_term = NAME_OF_TERM.get(vocab.column, {})
        self.entries: dict[str, list[str]] = {}
        for entry in vocab.ids:
            self.entries.setdefault(fold(entry), []).append(entry)

    def find(self, value: str) -> str:
        """Return the entry that `value` stands for, or `value` itself if there is none.

        That is, in this order, the same text, the name of an ontology term, or the only entry that differs in nothing
        but case, blanks, quotes and dashes.
        """
        if value in self.vocab.ids:
            return value
        name = self.term_name(value)
        return (name and self._respelled(name)) or self._respelled(value) or value

    def is_known(self, value: str) -> bool:
        """Whether an entry other than `unknown` has exactly this text."""
        return self.vocab.ids.get(value, self.vocab.unknown) != self.vocab.unknown

    def term_name(self, value: str) -> str | None:
        """Return the name of an ontology term; None for other values and terms without a name."""
        match = _TERM.fullmatch(value.strip())
        return self.name_of_term.get(f"{match[1].upper()}:{match[2]}") if match else None

    def nearest(self, value: str) -> str | None:
        """Return the known entry whose spelling is most similar to a value or the name of its term, if any is."""
        spellings = {spelling: entries for spelling, entries in self.entries.items() if self.is_known(entries[0])}
        found = difflib.get_close_matches(fold(self.term_name(value) or value), spellings, n=1)
        return spellings[found[0]][0] if found else None

    def _respelled(self, value: str) -> str | None:
        entries = self.entries.get(fold(value), [])
        return entries[0] if len(entries) == 1 else None
