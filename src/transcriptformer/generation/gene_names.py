"""Gene ids and symbols that users name, as tokens of a checkpoint."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.gene_map import load_symbol_maps
from transcriptformer.data.genes import SymbolMap, resolve
from transcriptformer.errors import UsageError

MAX_LISTED = 5
"""Maximum number of genes of a kind in an error message."""

N_NEAREST = 3
"""Maximum number of similar names suggested for an unknown gene."""


def gene_tokens(names: Sequence[str], checkpoint: Checkpoint, option: str) -> np.ndarray:
    """Map gene ids or symbols to tokens (names,), int64.

    Ids may be spelled as in files, with a version or in another case. Symbols are mapped by the checkpoint's
    `data_config.gene_map`, and stand for their ids in the vocabulary only.

    Parameters
    ----------
    option
        Option or argument that names the genes, for messages.

    Raises
    ------
    UsageError
        If genes are not in the vocabulary, or a symbol stands for several of its genes.
    """
    if isinstance(names, str):
        raise UsageError(f"{option}: must be a list of genes, not the text {names!r}")
    vocabulary = checkpoint.gene_vocab.genes
    ids = resolve(names, vocabulary)
    missing = [gene not in vocabulary for gene in ids]
    if any(missing):
        symbols = _symbols_in(checkpoint)
        found = [symbols.get(name, ()) if is_missing else () for name, is_missing in zip(ids, missing, strict=True)]
        ids = [candidates[0] if len(candidates) == 1 else gene for gene, candidates in zip(ids, found, strict=True)]
        ambiguous = {str(name): genes for name, genes in zip(names, found, strict=True) if len(genes) > 1}
        unknown = [str(name) for name, gene in zip(names, ids, strict=True) if gene not in vocabulary]
        unknown = [name for name in dict.fromkeys(unknown) if name not in ambiguous]
        if unknown or ambiguous:
            raise UsageError(f"{option}: {_describe(unknown, ambiguous, [*vocabulary, *symbols])}")
    return np.array([vocabulary[gene] for gene in ids], np.int64)


def distinct_tokens(names: Sequence[str], checkpoint: Checkpoint, option: str) -> np.ndarray:
    """Return what `gene_tokens` does, and raise UsageError if a gene is named twice."""
    tokens = gene_tokens(names, checkpoint, option)
    is_repeated = pd.Index(tokens).duplicated()
    if is_repeated.any():
        raise UsageError(f"{option}: gene {checkpoint.gene_vocab.names()[tokens[is_repeated][0]]} occurs twice")
    return tokens


def gene_symbols(checkpoint: Checkpoint) -> np.ndarray:
    """Return the symbol of each gene of the vocabulary (genes,), empty where the symbol maps have none."""
    symbol_of = {gene: symbol for symbol, genes in reversed(_symbols_in(checkpoint).items()) for gene in genes}
    return np.array([symbol_of.get(gene, "") for gene in checkpoint.gene_vocab.genes], object)


def _symbols_in(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Return the ids in the vocabulary that each symbol stands for, over all maps."""
    vocabulary = checkpoint.gene_vocab.genes
    found: dict[str, tuple[str, ...]] = {}
    for symbols in load_symbol_maps(checkpoint.config.model.data_config.gene_map).values():
        for symbol, genes in _known(symbols, vocabulary):
            found[symbol] = tuple(dict.fromkeys((*found.get(symbol, ()), *genes)))
    return found


def _known(symbols: SymbolMap, vocabulary: Mapping[str, int]) -> Iterable[tuple[str, tuple[str, ...]]]:
    for symbol, genes in symbols.items():
        known = tuple(gene for gene in genes if gene in vocabulary)
        if known:
            yield symbol, known


def _describe(unknown: Sequence[str], ambiguous: Mapping[str, Sequence[str]], known: Iterable[str]) -> str:
    parts = []
    if unknown:
        spellings: dict[str, str] = {}
        for name in known:
            spellings.setdefault(name.casefold(), name)
        listed = ", ".join(repr(name) + _nearest(name, spellings) for name in unknown[:MAX_LISTED])
        genes = "gene is" if len(unknown) == 1 else "genes are"
        parts.append(f"{len(unknown)} {genes} not in the checkpoint's vocabulary: {listed}{_more(unknown)}")
    if ambiguous:
        listed = ", ".join(f"{name!r} ({', '.join(ids)})" for name, ids in list(ambiguous.items())[:MAX_LISTED])
        plural = "symbol stands" if len(ambiguous) == 1 else "symbols stand"
        parts.append(f"{len(ambiguous)} {plural} for several genes; name one by id: {listed}{_more(ambiguous)}")
    return "; ".join(parts)


def _nearest(name: str, spellings: Mapping[str, str]) -> str:
    """Suggest the most similar ids and symbols, whatever their case."""
    found = difflib.get_close_matches(name.strip().casefold(), spellings, n=N_NEAREST)
    return f" (nearest: {', '.join(spellings[spelling] for spelling in found)})" if found else ""


def _more(names: Sequence[str] | Mapping[str, Sequence[str]]) -> str:
    return f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
