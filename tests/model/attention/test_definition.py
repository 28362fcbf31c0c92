"""Attention against a case worked out by hand, and its paths against each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transcriptformer.model.attention.blockwise import MAX_SCORES, QUERY_BLOCK, blockwise_attention
from transcriptformer.model.attention.definition import (
    Attention,
    ScoreMod,
    count_bias,
    plain_attention,
    visible_keys,
)

PATHS = {"plain": plain_attention, "blockwise": blockwise_attention}
each_path = pytest.mark.parametrize("attention", PATHS.values(), ids=PATHS)


def test_a_query_sees_allowed_keys_up_to_itself() -> None:
    mask = visible_keys(torch.tensor([[False, True, True, False]]))
    assert mask.int().tolist() == [
        [
            [0, 0, 0, 0],
            [0, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 1, 1, 0],
        ]
    ]


def test_count_bias_is_the_logarithm_of_one_more() -> None:
    torch.testing.assert_close(
        count_bias(torch.tensor([0.0, 1.0, math.e - 1]), eps=1e-6),
        torch.tensor([0.0, math.log(2), 1.0]),
        atol=2e-6,
        rtol=0,
    )


def softmax_by_hand(*scores: float) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


@each_path
@pytest.mark.parametrize("on_diagonal", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_three_positions_by_hand(attention: Attention, on_diagonal: bool, softcap: float) -> None:
    """One head of width 1; the values 1, 10, 100 show the weights in the result."""
    q, k, v = (torch.tensor(x).view(1, 1, 3, 1) for x in ([1.0, 2.0, -1.0], [0.5, 1.5, 1.0], [1.0, 10.0, 100.0]))
    bias = torch.tensor([[0.1, 0.7, 0.3]])

    def cap(score: float) -> float:
        return softcap * math.tanh(score / softcap) if softcap else score

    own = 1.0 if on_diagonal else 0.0
    first = [1.0]
    second = softmax_by_hand(cap(2 * 0.5 + 0.1), cap(2 * 1.5 + 0.7 * own))
    third = softmax_by_hand(cap(-0.5 + 0.1), cap(-1.5 + 0.7), cap(-1.0 + 0.3 * own))
    expected = [sum(w * x for w, x in zip(weights, (1, 10, 100), strict=False)) for weights in (first, second, third)]
    result = attention(q, k, v, ScoreMod(bias, torch.ones(1, 3, dtype=torch.bool), softcap, on_diagonal))
    torch.testing.assert_close(result.flatten(), torch.tensor(expected))


@each_path
@pytest.mark.parametrize("softcap", [0.0, 10.0])
def test_a_query_without_keys_gives_zero(attention: Attention, softcap: float) -> None:
    q = k = v = torch.ones(2, 1, 3, 4)
    allowed = torch.tensor([[False, False, True], [False, False, False]])
    result = attention(q, k, v, ScoreMod(torch.zeros(2, 3), allowed, softcap, True))
    expected = torch.zeros(2, 1, 3, 4)
    expected[0, 0, 2] = 1
    torch.testing.assert_close(result, expected)


@each_path
def test_huge_scores_stay_finite(attention: Attention) -> None:
    q = torch.full((1, 1, 2, 4), 1e18)
    mod = ScoreMod(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), 10.0, True)
    result = attention(q, q, torch.ones(1, 1, 2, 4), mod)
    torch.testing.assert_close(result, torch.ones(1, 1, 2, 4))


@pytest.mark.parametrize("softcap", [10.0, 60.0, 100.0, 1000.0])
@pytest.mark.parametrize("score", [-1000.0, 0.0, 1000.0])
def test_no_soft_cap_overflows(softcap: float, score: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.full((1, 1, 9, 4), 2.0), score / 4 + torch.randn(1, 1, 9, 4, generator=generator)
    v = torch.randn(1, 1, 9, 4, generator=generator)
    mod = ScoreMod(torch.zeros(1, 9), torch.ones(1, 9, dtype=torch.bool), softcap, True)
    # float32 rounds scores of 1,000 to 6e-5.
    torch.testing.assert_close(blockwise_attention(q, k, v, mod), plain_attention(q, k, v, mod), rtol=1e-3, atol=1e-4)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    length=st.sampled_from([1, 5, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 7]),
    softcap=st.sampled_from([0.0, 10.0]),
    on_diagonal=st.booleans(),
)
def test_blockwise_attention_equals_the_definition(seed: int, length: int, softcap: float, on_diagonal: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (3 * torch.randn(2, 3, length, 8, generator=generator) for _ in range(3))
    bias = count_bias(30 * torch.rand(2, length, generator=generator), 1e-6)
    allowed = torch.rand(2, length, generator=generator) < 0.7
    plain, in_blocks = (path(q, k, v, ScoreMod(bias, allowed, softcap, on_diagonal)) for path in PATHS.values())
    assert (in_blocks - plain).norm() <= 1e-5 * plain.norm()


def test_any_number_of_scores_may_be_computed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, 3, QUERY_BLOCK + 9, 8, generator=torch.Generator().manual_seed(0))
    bias, allowed = torch.zeros(2, q.shape[2]), torch.ones(2, q.shape[2], dtype=torch.bool)
    expected = plain_attention(q, k, v, ScoreMod(bias, allowed, 10.0, True))
    for max_scores in (1, 3 * QUERY_BLOCK**2):
        monkeypatch.setitem(MAX_SCORES, "cpu", max_scores)
        torch.testing.assert_close(blockwise_attention(q, k, v, ScoreMod(bias, allowed, 10.0, True)), expected)


def test_bfloat16_is_near_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 150, 16, generator=generator) for _ in range(3))
    bias, allowed = count_bias(30 * torch.rand(2, 150, generator=generator), 1e-6), torch.ones(2, 150, dtype=torch.bool)
    for path in PATHS.values():
        exact = path(q, k, v, ScoreMod(bias, allowed, 10.0, True))
        rounded = path(q.bfloat16(), k.bfloat16(), v.bfloat16(), ScoreMod(bias, allowed, 10.0, True))
        assert rounded.dtype == torch.bfloat16
        assert (rounded.float() - exact).norm() / exact.norm() < 2e-2
