"""Pointwise mutual information of genes: how one gene changes the probability of another to come next."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.errors import UsageError
from transcriptformer.generation.cells import CELLS_PER_GROUP, CellGroup, read_groups
from transcriptformer.generation.gene_names import distinct_tokens, gene_symbols
from transcriptformer.generation.means import log_mean, log_ratio_of_means
from transcriptformer.generation.next_genes import (
    PMI_KEY,
    SYMBOL_COLUMN,
    Answers,
    all_log_probabilities,
    answer,
    make_answers,
)
from transcriptformer.generation.null import adjusted, check_null, compare_with_null, draw_alike
from transcriptformer.generation.prompts import AuxValue, GeneCount, Prompt, aux_tokens, longest_prompt, make_prompts
from transcriptformer.runs.recording import OnProgress

CONTEXT_KEY, ERROR_KEY, Z_KEY, P_KEY, Q_KEY = "log_p_context", "standard_error", "z", "p", "q"

MAX_VALUES = 2**26
"""Maximum number of log-probabilities in memory at a time, for at least one source."""


class Measured(NamedTuple):
    """PMI of sources in one context, each array (sources, targets), float32.

    Attributes
    ----------
    log_p
        log p(t | C, s), of which averages over cells are logs of mean probabilities.
    log_p_context
        log p(t | C), over the same cells.
    pmi, standard_error
        Their difference and its standard error over cells; NaN where the target is the source or a gene of the context.
    n_prompts
        Number of prompts of the context without the source (sources,).
    """

    log_p: np.ndarray
    log_p_context: np.ndarray
    pmi: np.ndarray
    standard_error: np.ndarray
    n_prompts: np.ndarray


def pmi(
    model: Checkpoint,
    sources: Sequence[GeneCount],
    targets: Sequence[str] | None = None,
    *,
    context: Sequence[GeneCount] | str | Path | anndata.AnnData = (),
    groupby: str | None = None,
    cells_per_group: int = CELLS_PER_GROUP,
    null: int = 0,
    seed: int = 0,
    assay: AuxValue = None,
    **aux: AuxValue,
) -> anndata.AnnData:
    """Compute PMI(t; s | C) = log p(t | C, s) − log p(t | C) of sources s and targets t in a context C, in nats.

    Parameters
    ----------
    model
        Checkpoint returned by `load`.
    sources
        Genes, each alone (count 1) or in a pair with its count.
    targets
        Genes whose probability changes; None: all genes of the vocabulary.
    context
        Genes before the source, with counts; or cells, as a file or AnnData, over which probabilities are averaged.
    groupby
        Column of the `obs` of cells as context, each value of which is a context of its own.
    cells_per_group, seed
        Maximum number of cells per context, sampled with this seed.
    null
        Number of random sources to compare each source with; 0: none.
    assay, **aux
        As for `next_genes`; the metadata of cells come from these.

    Returns
    -------
    An AnnData with one row per source (and group), and one column per target. `X` holds log p(t | C, s), float32;
    `layers['log_p_context']` log p(t | C); `layers['pmi']` the difference. With cells, both are logs of mean
    probabilities, over the cells without the source (`obs['n_prompts']`), and `layers['standard_error']` is that of the
    PMI. With a null, `layers['z']` is the PMI in standard deviations from the mean of the random sources, `p` its
    two-sided empirical p-value and `q` that adjusted by Benjamini-Hochberg over the whole table. All are NaN for
    a source that all cells express; layers other than `log_p_context` also where a target is the source or among the
    genes given as context. The standard error is NaN for a single cell.

    Raises
    ------
    TranscriptFormerError
        If a gene, count or the context is invalid, or the checkpoint predicts no genes.

    Examples
    --------
    >>> import transcriptformer as tf
    >>> model = tf.load("checkpoints/tf_sapiens", precision="32")
    >>> of_factors = tf.pmi(model, ["FOXM1", "E2F1"], context=[("MKI67", 5)], null=100)
    >>> of_factors.to_df("pmi")
    """
    values = {"assay": assay, **aux}
    if isinstance(context, str | Path | anndata.AnnData):
        columns = [column for column, value in values.items() if value is not None]
        if columns:
            raise UsageError(f"{columns[0]}: cannot be combined with cells as context, which have their own")
        groups = read_groups(context, model, groupby, cells_per_group, seed, longest_context(model))
    elif groupby is not None or cells_per_group != CELLS_PER_GROUP:
        given = "groupby" if groupby is not None else "cells_per_group"
        raise UsageError(f"{given}: applies to cells as context, which here is genes")
    else:
        groups = [gene_context(model, context, values)]
    check_null(null, "null")
    made = make_sources(sources, model, "sources")
    return pmi_in_groups(model, made, make_targets(targets, model, "targets"), groups, null, seed)


def longest_context(checkpoint: Checkpoint) -> int:
    """Return the maximum number of genes of a context, behind which the source and the target follow."""
    return longest_prompt(checkpoint) - 1


def gene_context(
    checkpoint: Checkpoint, genes: Sequence[GeneCount], aux: Mapping[str, AuxValue], option: str = "context"
) -> CellGroup:
    """Return a context of genes, which may be none, with its metadata."""
    made = make_prompts([genes], checkpoint, option, longest_context(checkpoint))
    name, tokens = made[0].describe(checkpoint.gene_vocab.names()), aux_tokens(checkpoint, 1, aux)
    return CellGroup(name, made, tokens, is_genes=True)


def pmi_in_groups(
    checkpoint: Checkpoint,
    sources: Sequence[Prompt],
    targets: Answers,
    groups: Sequence[CellGroup],
    null: int = 0,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> anndata.AnnData:
    """Return what `pmi` does, for sources, targets and contexts already made."""
    plans = [_plan(checkpoint, sources, group, null, seed) for group in groups]
    n_done, n_total = 0, sum(len(plan.sources) for plan in plans)

    def advance(n_sources: int) -> None:
        nonlocal n_done
        n_done += n_sources
        if on_progress is not None:
            on_progress(n_done, n_total)

    runs = [_measure(checkpoint, plan, targets, advance) for plan in plans]
    own = Measured(
        *(np.concatenate([values[: len(sources)] for values in arrays]) for arrays in zip(*runs, strict=True))
    )
    layers = {CONTEXT_KEY: own.log_p_context, PMI_KEY: own.pmi}
    if not all(group.is_genes for group in groups):
        layers[ERROR_KEY] = own.standard_error
    if null:
        compared = [
            compare_with_null(run.pmi[i], run.pmi[random])
            for run, plan in zip(runs, plans, strict=True)
            for i, random in enumerate(plan.null)
        ]
        z, p = (np.stack(arrays) for arrays in zip(*compared, strict=True))
        layers |= {Z_KEY: z, P_KEY: p, Q_KEY: adjusted(p)}
    return answer(checkpoint, own.log_p, _describe(sources, groups, own.n_prompts, checkpoint), targets, layers)


def make_sources(sources: Sequence[GeneCount], checkpoint: Checkpoint, option: str) -> list[Prompt]:
    """Return a prompt of each source; UsageError if one is given twice with the same count."""
    made = make_prompts([sources if isinstance(sources, str) else [source] for source in sources], checkpoint, option)
    names = [prompt.describe(checkpoint.gene_vocab.names()) for prompt in made]
    repeated = next((name for name, n in Counter(names).items() if n > 1), None)
    if repeated is not None:
        raise UsageError(f"{option}: source {repeated} is given twice")
    return made


def make_targets(targets: Sequence[str] | None, checkpoint: Checkpoint, option: str) -> Answers:
    """Answer with the probabilities of targets, or of all genes of the vocabulary, over all tokens."""
    if targets is None:
        return make_answers(None, checkpoint)
    return Answers(distinct_tokens(targets, checkpoint, option))


class _Plan(NamedTuple):
    """Sources to ask about in a context: the user's, then the random ones, with the places of each one's null."""

    group: CellGroup
    sources: list[Prompt]
    null: list[np.ndarray]


def _plan(checkpoint: Checkpoint, made: Sequence[Prompt], group: CellGroup, null: int, seed: int) -> _Plan:
    if not null:
        return _Plan(group, list(made), [])
    taken = np.concatenate([prompt.tokens for prompt in (*made, *_shared(group))])
    genes = make_answers(None, checkpoint)
    expression = _expression(checkpoint, group, genes)
    is_free = ~np.isin(genes.tokens, taken)
    if is_free.sum() < null:
        raise UsageError(
            f"{null} random sources, but only {is_free.sum()} genes are neither sources nor in the context"
        )
    sources, place, places = list(made), dict[tuple[int, float], int](), list[np.ndarray]()
    for source in made:
        own = expression[genes.tokens == source.tokens[0]]
        rng = np.random.default_rng([seed, int(source.tokens[0])])
        chosen = genes.tokens[is_free][draw_alike(expression[is_free], own, null, rng)]
        keys = [(int(token), float(source.counts[0])) for token in chosen]
        for token, count in keys:
            if (token, count) not in place:  # several sources may draw the same gene
                place[token, count] = len(sources)
                sources.append(Prompt(np.array([token]), np.array([count], np.float32)))
        places.append(np.array([place[key] for key in keys]))
    return _Plan(group, sources, places)


def _shared(group: CellGroup) -> list[Prompt]:
    """Return the context if it is a list of genes, which come neither as sources nor as targets."""
    return group.prompts if group.is_genes else []


def _expression(checkpoint: Checkpoint, group: CellGroup, genes: Answers) -> np.ndarray:
    """Return how much each gene of the vocabulary is expressed in a context (genes,).

    It is log(1 + mean count) over cells; of genes, which tell nothing of the expression of others, log p(g | C).
    """
    if group.is_genes:
        return all_log_probabilities(checkpoint, group.prompts, group.aux_tokens, genes)[0]
    tokens, counts = (np.concatenate(arrays) for arrays in zip(*group.prompts, strict=True))
    totals = np.bincount(tokens, weights=counts, minlength=len(checkpoint.gene_vocab))
    return np.log1p(totals[genes.tokens] / len(group.prompts))


def _measure(checkpoint: Checkpoint, plan: _Plan, answers: Answers, advance: Callable[[int], None]) -> Measured:
    """Measure the PMI of each source of a plan, some of them at a time."""
    group = plan.group
    alone = all_log_probabilities(checkpoint, group.prompts, group.aux_tokens, answers)
    n_at_once = max(1, MAX_VALUES // (len(group.prompts) * len(answers.tokens)))
    parts = list[tuple[np.ndarray, ...]]()
    for start in range(0, len(plan.sources), n_at_once):
        chunk = plan.sources[start : start + n_at_once]
        without = [
            np.flatnonzero([source.tokens[0] not in prompt.tokens for prompt in group.prompts]) for source in chunk
        ]
        prompts = [group.prompts[i].followed_by(s) for s, cells in zip(chunk, without, strict=True) for i in cells]
        log_p = all_log_probabilities(checkpoint, prompts, group.aux_tokens[np.concatenate(without)], answers)
        of_sources = np.split(log_p, np.cumsum([len(cells) for cells in without])[:-1])
        parts += [_compare(of_s, alone[cells]) for of_s, cells in zip(of_sources, without, strict=True)]
        advance(len(chunk))
    log_p, context, difference, error, n = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    own = np.array([source.tokens[0] for source in plan.sources])[:, None]
    is_known = (answers.tokens == own) | np.isin(answers.tokens, [t for p in _shared(group) for t in p.tokens])
    difference[is_known] = error[is_known] = np.nan
    return Measured(log_p, context, difference, error, n)


def _compare(log_p: np.ndarray, alone: np.ndarray) -> tuple[np.ndarray, ...]:
    """Compare log-probabilities with and without a source (cells, targets); NaN without cells."""
    if not len(log_p):
        nothing = np.full(log_p.shape[1], np.nan, np.float32)
        return nothing, nothing, nothing, nothing, np.array(0)
    difference, error = log_ratio_of_means(log_p, alone)
    means = log_mean(log_p)[0], log_mean(alone)[0]
    return *(values.astype(np.float32) for values in (*means, difference, error)), np.array(len(log_p))


def _describe(
    made: Sequence[Prompt], groups: Sequence[CellGroup], n_prompts: np.ndarray, checkpoint: Checkpoint
) -> pd.DataFrame:
    """Return the source, its symbol and count, and the context of each row."""
    names, symbols = checkpoint.gene_vocab.names(), gene_symbols(checkpoint)
    tokens = np.array([prompt.tokens[0] for prompt in made], np.int64)
    obs = pd.DataFrame(
        {
            "source": np.tile(names[tokens].astype(str), len(groups)),
            SYMBOL_COLUMN: np.tile(symbols[tokens - len(checkpoint.gene_vocab.special_tokens)], len(groups)),
            "count": np.tile([prompt.counts[0] for prompt in made], len(groups)),
            "context": np.repeat([group.name for group in groups], len(made)),
            "n_prompts": n_prompts,
        }
    )
    rows = [prompt.describe(names).removesuffix("=1") for prompt in made]
    obs.index = pd.Index(rows if len(groups) == 1 else [f"{group.name} {row}" for group in groups for row in rows])
    return obs
