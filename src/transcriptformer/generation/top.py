"""The genes with the highest numbers in each row of an answer."""

from collections.abc import Iterator
from typing import NamedTuple

import anndata
import numpy as np

from transcriptformer.generation.next_genes import PMI_KEY, SYMBOL_COLUMN
from transcriptformer.generation.pmi import CONTEXT_KEY, ERROR_KEY, P_KEY, Q_KEY, Z_KEY


class Ranking(NamedTuple):
    """Best genes of one row: its title, the names of the columns, and a row of texts per gene."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def top_genes(answer: anndata.AnnData, n: int) -> Iterator[Ranking]:
    """Yield the `n` best genes of each row: by z-score if there is one, PMI of sources, or else probability."""
    is_pmi = CONTEXT_KEY in answer.layers
    by = np.asarray(answer.layers[Z_KEY if Z_KEY in answer.layers else PMI_KEY] if is_pmi else answer.X)
    layers = [name for name in (PMI_KEY, ERROR_KEY, Z_KEY, P_KEY, Q_KEY) if name in answer.layers]
    numbers = {
        "probability": np.exp(np.asarray(answer.X)),
        **{name: np.asarray(answer.layers[name]) for name in layers},
    }
    symbols = answer.var[SYMBOL_COLUMN]
    columns = ["gene", *(["symbol"] if symbols.any() else []), *(name.replace("_", " ") for name in numbers)]
    for i, title in enumerate(_titles(answer)):
        order = np.argsort(-by[i], kind="stable")  # NaN come last
        best = [j for j in order[:n] if np.isfinite(by[i, j])]
        rows = [
            [
                *([answer.var_names[j], symbols.iloc[j]] if symbols.any() else [answer.var_names[j]]),
                *(f"{values[i, j]:.3g}" for values in numbers.values()),
            ]
            for j in best
        ]
        yield Ranking(title, columns, rows)


def _titles(answer: anndata.AnnData) -> list[str]:
    obs = answer.obs
    if "genes" in obs:
        return [f"{name}: {genes or 'no genes'}" for name, genes in zip(obs.index, obs["genes"], strict=True)]
    if "source" in obs:
        columns = obs["source"], obs[SYMBOL_COLUMN], obs["context"]
        return [
            f"{source}{f' ({symbol})' if symbol else ''} after {context or 'no genes'}"
            for source, symbol, context in zip(*columns, strict=True)
        ]
    return [f"{name}: {n} cells" for name, n in zip(obs.index, obs["n_cells"], strict=True)]
