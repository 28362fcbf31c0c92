"""Cells drawn gene by gene follow the probabilities of the model."""

import numpy as np
import pytest
import torch
from scipy import stats

from tests.generation.checkpoints import load
from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.errors import UsageError
from transcriptformer.generation.prompts import Prompt
from transcriptformer.generation.sample import Drawn, NewCells, Sampler, Sampling, choose_genes, zero_truncated_poisson
from transcriptformer.model.transcriptformer import TranscriptFormer

CLIP = 30
NO_GENES = Prompt(np.zeros(0, np.int64), np.zeros(0, np.float32))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load()


def model_of(checkpoint: Checkpoint) -> TranscriptFormer:
    assert isinstance(checkpoint.model, TranscriptFormer)
    return checkpoint.model


def genes_of(checkpoint: Checkpoint) -> np.ndarray:
    """All genes, without special tokens."""
    return np.arange(len(checkpoint.gene_vocab)) >= len(checkpoint.gene_vocab.special_tokens)


def new_cells(lengths: list[int], prompts: list[Prompt] | None = None, total: float = 300) -> NewCells:
    n = len(lengths)
    aux = np.full((n, 1), 2)
    return NewCells(np.arange(n), prompts or [NO_GENES] * n, aux, np.array(lengths), np.full(n, total))


def draw(checkpoint: Checkpoint, cells: NewCells, **settings: float) -> Drawn:
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    return Sampler(model_of(checkpoint), sampling, genes_of(checkpoint), CLIP)(cells)


def first_gene(checkpoint: Checkpoint) -> np.ndarray:
    """Probability of each token to be the first gene."""
    cell = torch.full((1, 2), checkpoint.gene_vocab.pad)
    encoded = model_of(checkpoint)(cell, torch.zeros(1, 2), torch.tensor([[2]]))
    return model_of(checkpoint).gene_logits(encoded.hidden[0, 0]).softmax(0).double().numpy()


def random_prompts(checkpoint: Checkpoint, lengths: list[int]) -> list[Prompt]:
    random, genes = np.random.default_rng(0), np.flatnonzero(genes_of(checkpoint))
    return [
        Prompt(random.choice(genes, n, replace=False), random.integers(1, 9, n).astype(np.float32)) for n in lengths
    ]


def test_frequencies_of_drawn_genes_equal_the_probabilities(checkpoint: Checkpoint) -> None:
    n = 6000
    drawn = draw(checkpoint, new_cells([1] * n), seed=1).genes[:, 0].numpy()
    is_gene = genes_of(checkpoint)
    p = np.where(is_gene, first_gene(checkpoint), 0)
    observed, expected = np.bincount(drawn, minlength=len(p)), n * p / p.sum()
    assert observed[~is_gene].sum() == 0
    rare = is_gene & (expected < 10)
    parts = [np.append(counts[is_gene & ~rare], counts[rare].sum()) for counts in (observed, expected)]
    assert len(parts[0]) > 50
    assert stats.chisquare(*parts).pvalue > 0.01


def test_temperature_and_top_p_draw_from_fewer_genes(checkpoint: Checkpoint) -> None:
    p = np.where(genes_of(checkpoint), first_gene(checkpoint), 0)
    most_probable = set(draw(checkpoint, new_cells([1] * 300), temperature=1e-6).genes[:, 0].tolist())
    assert most_probable == {int(p.argmax())}
    drawn = set(draw(checkpoint, new_cells([1] * 3000), top_p=0.2).genes[:, 0].tolist())
    order = np.argsort(-p)
    n_enough = int(np.searchsorted(np.cumsum(p[order]) / p.sum(), 0.2)) + 1
    assert drawn == set(order[:n_enough].tolist())


def test_a_temperature_raises_probabilities_to_its_inverse() -> None:
    p, n = torch.tensor([0.5, 0.3, 0.2, 0.0]), 20_000
    waits = torch.from_numpy(np.random.default_rng(0).standard_exponential((n, 4)))
    allowed = torch.tensor([True, True, True, False]).repeat(n, 1)
    chosen = choose_genes(p.log().repeat(n, 1), allowed, waits, Sampling(temperature=0.5))
    expected = n * (p[:3] ** 2 / (p**2).sum()).numpy()
    assert stats.chisquare(np.bincount(chosen.numpy(), minlength=3), expected).pvalue > 0.01


def test_no_gene_is_drawn_twice(checkpoint: Checkpoint) -> None:
    prompts = random_prompts(checkpoint, [5, 0, 60])
    drawn = draw(checkpoint, new_cells([100, 127, 60], prompts))
    for row, length, prompt in zip(drawn.genes.numpy(), [100, 127, 60], prompts, strict=True):
        assert len(set(row[:length])) == length
        assert row[:length].min() >= len(checkpoint.gene_vocab.special_tokens)
        assert (row[length:] == checkpoint.gene_vocab.pad).all()
        np.testing.assert_array_equal(row[: len(prompt.tokens)], prompt.tokens)


def test_counts_are_whole_and_those_of_the_prompt_stay(checkpoint: Checkpoint) -> None:
    prompts = random_prompts(checkpoint, [20, 3])
    for rounds in (0, 2):
        drawn = draw(checkpoint, new_cells([40, 30], prompts, total=200), count_rounds=rounds)
        for row, length, prompt in zip(drawn.counts.numpy(), [40, 30], prompts, strict=True):
            assert set(row[:length]) <= set(range(1, CLIP + 1))
            assert not row[length:].any()
            np.testing.assert_array_equal(row[: len(prompt.counts)], prompt.counts)


@pytest.mark.parametrize("rounds", [0, 1])
def test_the_same_cells_whatever_the_batch(rounds: int, checkpoint: Checkpoint) -> None:
    lengths = [40, 7, 0, 25, 31]
    cells = new_cells(lengths, random_prompts(checkpoint, [4, 7, 0, 0, 11]))
    together = draw(checkpoint, cells, seed=5, count_rounds=rounds)
    for batch in ([3, 1], [0], [4], [2]):
        apart = draw(checkpoint, cells.take(np.array(batch)), seed=5, count_rounds=rounds)
        width = apart.genes.shape[1]
        assert apart.genes.equal(together.genes[batch, :width])
        assert apart.counts.equal(together.counts[batch, :width])
        torch.testing.assert_close(apart.log_likelihood, together.log_likelihood[batch])
    assert not draw(checkpoint, cells, seed=6).genes.equal(together.genes)


def test_random_numbers_are_not_those_that_shuffle_genes(checkpoint: Checkpoint) -> None:
    """NumPy pads seeds with zeros: [seed, cell, 0] is the stream [seed, cell], by which data.tokenize shuffles."""
    drawn = draw(checkpoint, new_cells([1] * 50), seed=5).genes[:, 0].numpy()
    log_p, is_gene = torch.from_numpy(first_gene(checkpoint)).log(), torch.from_numpy(genes_of(checkpoint))
    waits = np.stack([np.random.default_rng([5, row]).standard_exponential(len(log_p)) for row in range(50)])
    allowed = is_gene.repeat(50, 1)
    shuffling = choose_genes(log_p.repeat(50, 1), allowed, torch.from_numpy(waits), Sampling()).numpy()
    assert (drawn == shuffling).mean() < 0.5


@pytest.mark.parametrize("rounds", [0, 1])
def test_the_chain_rule_holds(rounds: int, checkpoint: Checkpoint) -> None:
    lengths = [40, 7, 25]
    cells = new_cells(lengths, random_prompts(checkpoint, [4, 7, 0]))
    drawn, model = draw(checkpoint, cells, count_rounds=rounds), model_of(checkpoint)
    pad = torch.full((3, 1), checkpoint.gene_vocab.pad)
    genes, counts = torch.cat([drawn.genes, pad], 1), torch.cat([drawn.counts, torch.zeros(3, 1)], 1)
    encoded = model(genes, counts, torch.from_numpy(cells.aux_tokens))
    expected = -model.gene_nll(encoded) * torch.tensor(lengths)
    torch.testing.assert_close(drawn.log_likelihood, expected, rtol=1e-6, atol=1e-4)


def test_running_totals_are_exact_for_the_last_gene(checkpoint: Checkpoint) -> None:
    """With a single gene left, the softmax of the count head is known, and the total is met in the mean."""
    total = 400.0
    drawn = draw(checkpoint, new_cells([50] * 40, total=total), count_rounds=1)
    assert abs(drawn.counts.sum(1).mean() / total - 1) < 0.1  # a little more, because counts are at least 1


@pytest.mark.parametrize("mu", [1e-9, 0.3, 2.0, 12.0])
def test_counts_are_zero_truncated_poisson(mu: float) -> None:
    n = 20_000
    counts = zero_truncated_poisson(np.full(n, mu), (np.arange(n) + 0.5) / n, clip_counts=15.5)
    p = stats.poisson.pmf(np.arange(1, 16), mu) / -np.expm1(-mu)
    p[-1] += stats.poisson.sf(15, mu) / -np.expm1(-mu)
    np.testing.assert_allclose(np.bincount(counts.astype(int), minlength=16)[1:], n * p, atol=1, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature (--temperature): must be from"),
        ({"temperature": -1}, "temperature (--temperature): must be from"),
        ({"temperature": float("nan")}, "temperature (--temperature): must be from"),
        ({"top_p": 0}, "top_p (--top-p): must be more than 0"),
        ({"top_p": 1.5}, "top_p (--top-p): must be more than 0, at most 1"),
        ({"count_rounds": -1}, "count_rounds (--count-rounds): must be from"),
        ({"seed": -1}, "seed (--seed): must be from"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match="^" + message.replace("(", r"\(").replace(")", r"\)")):
        Sampling(**settings)  # type: ignore[arg-type]
