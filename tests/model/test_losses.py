import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transcriptformer.model import losses
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


def plain_cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor, is_gene: Tensor) -> Tensor:
    """The definition: all logits at once."""
    losses = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return losses * is_gene


@pytest.mark.parametrize("at_once", [1, 700, 2**24])
def test_genes_some_at_a_time_have_the_loss_and_gradients_of_all_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "MAX_LOGITS", {"cpu": at_once})
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 100))
    hidden, targets = torch.randn(3, 20, 8, requires_grad=True), torch.randint(100, (3, 20))
    is_gene, weights = torch.rand(3, 20) < 0.7, torch.rand(3, 20)
    found = []
    for loss in (
        gene_cross_entropy(head, hidden, targets, is_gene, 100),
        plain_cross_entropy(head, hidden, targets, is_gene),
    ):
        gradients = torch.autograd.grad((loss * weights).sum(), [hidden, *head.parameters()])
        found.append([loss, *gradients])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_cells_without_genes_have_no_gene_loss() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    loss = gene_cross_entropy(nn.Linear(4, 10), torch.randn(2, 3, 4), nothing.long(), nothing, 10)
    assert loss.tolist() == [[0.0] * 3] * 2


PEAK = """
import sys, torch
from torch import nn
from transcriptformer.model.losses import gene_cross_entropy
from tests.model.test_losses import plain_cross_entropy
from tests.peak_memory import peak_memory
torch.manual_seed(0)
n_genes, n_tokens = 247_388, 2_000
head = nn.Linear(16, n_genes)
hidden, targets = torch.randn(1, n_tokens, 16, requires_grad=True), torch.randint(n_genes, (1, n_tokens))
is_gene = torch.ones(1, n_tokens, dtype=torch.bool)
before = peak_memory()
if sys.argv[1] == "plain":
    loss = plain_cross_entropy(head, hidden, targets, is_gene)
else:
    loss = gene_cross_entropy(head, hidden, targets, is_gene, n_genes)
loss.sum().backward()
print(peak_memory() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_with_the_largest_vocabulary_a_fraction_of_the_memory_is_needed() -> None:
    peaks = {}
    for way in ("plain", "some at a time"):
        done = subprocess.run([sys.executable, "-c", PEAK, way], capture_output=True, text=True, check=True)
        peaks[way] = int(done.stdout)
    assert peaks["some at a time"] < 0.15 * peaks["plain"]


def test_means_are_over_genes_and_nan_without_any() -> None:
    values = torch.tensor([[1.0, 3.0, torch.nan], [5.0, 5.0, 5.0]])
    is_gene = torch.tensor([[True, True, False], [False, False, False]])
    means = mean_over_genes(values, is_gene)
    assert means[0] == 2
    assert means[1].isnan()
