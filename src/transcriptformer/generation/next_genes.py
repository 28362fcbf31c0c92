"""Probabilities of the gene that follows a prompt."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.batches import Batch
from transcriptformer.errors import UsageError
from transcriptformer.generation.finite import gene_log_probabilities
from transcriptformer.generation.gene_names import distinct_tokens, gene_symbols
from transcriptformer.generation.prompts import (
    AuxValue,
    GeneCount,
    Prompt,
    aux_tokens,
    make_prompts,
    prompt_batches,
    require_gene_head,
)
from transcriptformer.model.losses import MAX_LOGITS
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.batch_size import batch_limits
from transcriptformer.runs.module import prepare_encoder
from transcriptformer.runs.output import PROVENANCE_KEY, provenance_of
from transcriptformer.runs.recording import OnProgress
from transcriptformer.runtime.memory import Halving

PMI_KEY, RENORMALIZED_KEY = "pmi", "renormalized_over"
SYMBOL_COLUMN = "symbol"


class Answers(NamedTuple):
    """Genes whose probabilities are asked for.

    Attributes
    ----------
    tokens
        Their tokens (answers,), int64.
    is_renormalized
        Whether the probabilities sum to 1 over these genes, instead of over all tokens.
    """

    tokens: np.ndarray
    is_renormalized: bool = False

    def log_probabilities(self, model: TranscriptFormer, hidden: Tensor) -> Tensor:
        """Return log-probabilities (…, answers), float32, of the gene that each state (…, D) predicts."""
        log_p = gene_log_probabilities(model, hidden)[..., torch.from_numpy(self.tokens).to(hidden.device)]
        return log_p.log_softmax(-1) if self.is_renormalized else log_p


def make_answers(candidates: Sequence[str] | None, checkpoint: Checkpoint, option: str = "candidates") -> Answers:
    """Answer with all genes of the vocabulary, or with candidates, over which probabilities are renormalized.

    Raises
    ------
    UsageError
        If candidates are unknown, repeated or fewer than two.
    """
    if candidates is None:
        return Answers(np.fromiter(checkpoint.gene_vocab.genes.values(), np.int64))
    tokens = distinct_tokens(candidates, checkpoint, option)
    if len(tokens) < 2:
        raise UsageError(f"{option}: probabilities of {len(tokens)} genes say nothing; give at least two")
    return Answers(tokens, is_renormalized=True)


@torch.inference_mode()
def log_probabilities(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    aux: np.ndarray,
    answers: Answers,
    on_progress: OnProgress | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield log-probabilities of the gene after each prompt, some prompts at a time, longest first.

    The model runs as in training, without the count bias on the diagonal, and its gene head at the last position only.

    Parameters
    ----------
    aux
        Auxiliary tokens (prompts, columns).

    Yields
    ------
    Indices of prompts (n,), and their log-probabilities (n, answers), float32.

    Raises
    ------
    TranscriptFormerError
        If the checkpoint predicts no genes, or the probabilities are NaN.
    """
    model = require_gene_head(checkpoint)
    _prepare(model, checkpoint, np.array([len(prompt.tokens) for prompt in prompts]))
    advice = "use another device or --precision 16-mixed"
    last_states = Halving(
        lambda batch: _last_states(model, batch), Batch.size, Batch.halves, _join_states, "prompt", advice
    )
    n_at_once = max(1, MAX_LOGITS[checkpoint.device.type] // len(checkpoint.gene_vocab))
    n_done = 0
    for batch in prompt_batches(prompts, aux, checkpoint, batch_limits(checkpoint)):
        hidden = last_states(batch.to(checkpoint.device))
        for rows, states in zip(torch.split(batch.rows, n_at_once), torch.split(hidden, n_at_once), strict=True):
            yield rows.numpy(), answers.log_probabilities(model, states).cpu().numpy()
        n_done += len(batch.rows)
        if on_progress is not None:
            on_progress(n_done, len(prompts))


def all_log_probabilities(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    aux: np.ndarray,
    answers: Answers,
    on_progress: OnProgress | None = None,
) -> np.ndarray:
    """Return what `log_probabilities` yields, in the order of the prompts: (prompts, answers), float32."""
    log_p = np.empty((len(prompts), len(answers.tokens)), np.float32)
    for rows, values in log_probabilities(checkpoint, prompts, aux, answers, on_progress):
        log_p[rows] = values
    return log_p


def _prepare(model: TranscriptFormer, checkpoint: Checkpoint, lengths: np.ndarray) -> None:
    """Move the model to its device, choose its attention and cache gene embeddings."""
    model.to(checkpoint.device)
    prepare_encoder(model, checkpoint.config.model.inference_config, lengths, checkpoint.device)


def _last_states(model: TranscriptFormer, batch: Batch) -> Tensor:
    """Return the state after the last gene of each prompt (B, D)."""
    encoded = model(batch.gene_tokens, batch.gene_counts, batch.aux_tokens)
    n_genes = encoded.is_gene.sum(1)
    return encoded.hidden[torch.arange(len(n_genes), device=n_genes.device), n_genes]


def _join_states(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second])


def next_genes(
    model: Checkpoint,
    prompts: Sequence[Sequence[GeneCount]],
    *,
    assay: AuxValue = None,
    candidates: Sequence[str] | None = None,
    **aux: AuxValue,
) -> anndata.AnnData:
    """Compute the probability of each gene to come next after a prompt.

    Parameters
    ----------
    model
        Checkpoint returned by `load`.
    prompts
        Genes of each prompt, in order: ids or symbols, each alone (count 1) or in a pair with its count. A prompt may
        be empty.
    assay
        Assay of all prompts, or one per prompt; None: unknown.
    candidates
        Genes to choose among; None: all genes of the vocabulary.
    **aux
        Values of other metadata columns that the checkpoint was trained with, like `assay`.

    Returns
    -------
    An AnnData, prompts × genes of the vocabulary (or candidates). `X` holds natural log-probabilities, float32, over
    all tokens; of candidates, over these, which `uns['renormalized_over']` lists. `layers['pmi']` holds the difference
    to the log-probability without the genes of the prompt. `obs` describes the prompts, `var` the symbols, and
    `uns['transcriptformer']` the provenance.

    Raises
    ------
    TranscriptFormerError
        If a gene or count is invalid, a prompt is too long, or the checkpoint predicts no genes.

    Examples
    --------
    >>> import transcriptformer as tf
    >>> model = tf.load("checkpoints/tf_sapiens", precision="32")
    >>> after = tf.next_genes(model, [[("FOXM1", 3), "MKI67"], ["CD3E"]], assay="10x 3' v3")
    >>> after.to_df().iloc[0].nlargest(10)
    """
    values = {"assay": assay, **aux}
    answers, made = make_answers(candidates, model), make_prompts(prompts, model)
    return ask(model, made, aux_tokens(model, len(made), values), answers)


def ask(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    aux: np.ndarray,
    answers: Answers,
    names: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
) -> anndata.AnnData:
    """Return what `next_genes` does, for prompts already made.

    Parameters
    ----------
    aux
        Auxiliary tokens (prompts, columns).
    names
        Names of the prompts; None: their numbers.
    """
    without_genes, place = np.unique(aux, axis=0, return_inverse=True)
    empty = Prompt(np.zeros(0, np.int64), np.zeros(0, np.float32))
    asked = [*prompts, *[empty] * len(without_genes)]
    log_p = all_log_probabilities(checkpoint, asked, np.vstack([aux, without_genes]), answers, on_progress)
    log_p, alone = log_p[: len(prompts)], log_p[len(prompts) :]
    obs = describe_prompts(prompts, aux, checkpoint, names)
    return answer(checkpoint, log_p, obs, answers, {PMI_KEY: log_p - alone[place.reshape(-1)]})


def answer(
    checkpoint: Checkpoint, values: np.ndarray, obs: pd.DataFrame, answers: Answers, layers: Mapping[str, np.ndarray]
) -> anndata.AnnData:
    """Combine log-probabilities (rows, answers) with their genes and provenance."""
    names = checkpoint.gene_vocab.names()
    uns: dict[str, object] = {PROVENANCE_KEY: provenance_of([], checkpoint, checkpoint.weights_sha256(), [])}
    if answers.is_renormalized:
        uns[RENORMALIZED_KEY] = names[answers.tokens].astype(str)
    var = pd.DataFrame(
        {SYMBOL_COLUMN: gene_symbols(checkpoint)[answers.tokens - len(checkpoint.gene_vocab.special_tokens)]},
        index=names[answers.tokens].astype(str),
    )
    return anndata.AnnData(values, obs=obs, var=var, layers=dict(layers), uns=uns)


def describe_prompts(
    prompts: Sequence[Prompt], aux: np.ndarray, checkpoint: Checkpoint, names: Sequence[str] | None = None
) -> pd.DataFrame:
    """Return the genes with their counts, their number and the metadata of each prompt."""
    genes = checkpoint.gene_vocab.names()
    columns: dict[str, object] = {
        "genes": [prompt.describe(genes) for prompt in prompts],
        "n_genes": [len(prompt.tokens) for prompt in prompts],
    }
    for i, (column, vocab) in enumerate(checkpoint.aux_vocabs.items()):
        name_of = {token: name for name, token in vocab.ids.items()}
        columns[column] = [name_of[token] for token in aux[:, i].tolist()]
    return pd.DataFrame(columns, index=list(map(str, range(len(prompts)) if names is None else names)))
