import math

import pytest
import torch

from transcriptformer.model.losses import gene_cross_entropy, mean_over_genes, zero_truncated_poisson_nll

EPS = 1e-6


def test_probabilities_of_all_counts_sum_to_one() -> None:
    """The exact form is a distribution over 1, 2, 3, … where its normalizer is not cut at 0."""
    for mu in (0.8, 2.5, 9.0):
        counts = torch.arange(1.0, 200.0)
        nll = zero_truncated_poisson_nll(torch.tensor(mu), counts, EPS, clip_counts=1e9, softplus_approx=False)
        assert math.isclose(torch.exp(-nll).sum().item(), 1, rel_tol=1e-5)


@pytest.mark.parametrize("softplus_approx", [True, False])
def test_one_count_by_hand(softplus_approx: bool) -> None:
    mu, count = 3.0, 2.0
    normalizer = mu - math.log1p(math.exp(-mu)) if softplus_approx else math.log(math.exp(mu) - 1)
    expected = -count * math.log(mu) + normalizer + math.log(2)
    nll = zero_truncated_poisson_nll(torch.tensor(mu), torch.tensor(count), EPS, 30, softplus_approx)
    assert math.isclose(nll.item(), expected, rel_tol=1e-5)


def test_the_normalizer_is_not_let_below_zero() -> None:
    nll = zero_truncated_poisson_nll(torch.tensor(0.1), torch.tensor(1.0), EPS, 30, softplus_approx=True)
    assert math.isclose(nll.item(), -math.log(0.1 + EPS), rel_tol=1e-5)


def test_counts_are_clipped() -> None:
    mu = torch.tensor(4.0)
    high, limit = (zero_truncated_poisson_nll(mu, torch.tensor(c), EPS, 30, True) for c in (500.0, 30.0))
    assert high == limit


def test_cross_entropy_is_per_position() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)]]])
    losses = gene_cross_entropy(logits, torch.tensor([[0, 1]]))
    torch.testing.assert_close(losses, torch.tensor([[math.log(2), math.log(4 / 3)]]))


def test_means_are_over_genes_and_nan_without_any() -> None:
    values = torch.tensor([[1.0, 3.0, torch.nan], [5.0, 5.0, 5.0]])
    is_gene = torch.tensor([[True, True, False], [False, False, False]])
    means = mean_over_genes(values, is_gene)
    assert means[0] == 2
    assert means[1].isnan()
