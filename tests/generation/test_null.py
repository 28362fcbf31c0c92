"""The null: random sources of like expression, z-scores and p-values."""

import numpy as np
import pytest
from scipy import stats

from transcriptformer.errors import UsageError
from transcriptformer.generation.null import adjusted, check_null, compare_with_null, draw_alike


def test_random_sources_are_alike_in_expression() -> None:
    expression = np.arange(1000.0)
    drawn = draw_alike(expression, np.array([500.0]), 20, np.random.default_rng(0))
    assert len(set(drawn.tolist())) == 20
    assert np.abs(drawn - 500).max() <= 50, "the nearest 100"
    assert set(draw_alike(expression, np.array([0.0]), 1000, np.random.default_rng(0)).tolist()) == set(range(1000))


def test_ties_are_drawn_alike() -> None:
    drawn = np.concatenate(
        [draw_alike(np.zeros(1000), np.array([0.0]), 10, np.random.default_rng(seed)) for seed in range(100)]
    )
    assert stats.chisquare(np.histogram(drawn, 10, (0, 1000))[0]).pvalue > 1e-4


def test_z_scores_and_p_values_are_those_of_the_definition() -> None:
    null = np.random.default_rng(0).normal(1, 2, (99, 3))
    values = np.array([20.0, null[:, 1].mean(), np.nan])
    z, p = compare_with_null(values, null)
    np.testing.assert_allclose(z[0], (20 - null[:, 0].mean()) / null[:, 0].std(ddof=1), rtol=1e-5)
    assert abs(z[1]) < 1e-5
    assert p[0] == pytest.approx(2 / 100)
    assert p[1] > 0.8
    assert np.isnan(z[2])
    assert np.isnan(p[2])


def test_a_random_source_that_is_the_target_is_left_out() -> None:
    null = np.array([[0.0, 1, 2, 3, np.nan]] * 2).T
    z, p = compare_with_null(np.array([9.0, 1.5]), null)
    assert p.tolist() == pytest.approx([2 / 5, 1.0])
    assert z[1] == 0
    z, p = compare_with_null(np.array([1.0]), np.full((10, 1), np.nan))
    assert np.isnan([z[0], p[0]]).all()


def test_p_values_are_uniform_under_the_null() -> None:
    rng = np.random.default_rng(1)
    p = np.concatenate([compare_with_null(rng.normal(size=1), rng.normal(size=(199, 1)))[1] for _ in range(2000)])
    for level in (0.05, 0.2, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=0.03)


def test_p_values_are_adjusted_over_the_whole_table() -> None:
    p = np.array([[0.01, np.nan], [0.02, 0.5]], np.float32)
    q = adjusted(p)
    np.testing.assert_allclose(q[~np.isnan(q)], stats.false_discovery_control([0.01, 0.02, 0.5]), rtol=1e-6)
    assert np.isnan(q[0, 1])
    assert np.isnan(adjusted(np.full((2, 2), np.nan))).all()


def test_too_small_a_null_is_refused() -> None:
    check_null(0, "null")
    check_null(10, "null")
    with pytest.raises(UsageError, match=r"^null 5: too few random sources; give at least 10, or 0 for no null$"):
        check_null(5, "null")
