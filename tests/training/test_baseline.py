"""The frequency baseline, and heads initialized with it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden_cases import CHECKPOINT
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.config import LossConfig, ModelConfig
from transcriptformer.data.batches import Batch
from transcriptformer.data.tokenize import Tokens
from transcriptformer.model.losses import zero_truncated_poisson_nll
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.training.baseline import Baseline, GeneStatistics, measure_baseline, start_from_frequencies

PAD = 1


def tokens(genes: list[list[int]], counts: list[list[float]]) -> Tokens:
    offsets = np.concatenate([[0], np.cumsum([len(cell) for cell in genes])])
    return Tokens(np.concatenate(genes).astype(np.int32), np.concatenate(counts).astype(np.float32), offsets)


def batch(genes: list[list[int]], counts: list[list[float]]) -> Batch:
    arrays = torch.tensor(genes), torch.tensor(counts)
    return Batch(torch.arange(len(genes)), *arrays, torch.zeros(len(genes), 0, dtype=torch.long))


def test_statistics_are_cells_and_mean_counts() -> None:
    statistics = GeneStatistics.from_tokens([tokens([[7, 8], [8]], [[2, 4], [6]]), tokens([[8]], [[2]])], n_tokens=10)
    assert statistics.occurrences[7:].tolist() == [1, 3, 0]
    assert statistics.rates[7:].tolist() == [2, 4, 1]
    assert np.exp(statistics.log_frequencies).sum() == pytest.approx(1)


def test_statistics_survive_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    statistics = GeneStatistics.from_tokens([tokens([[7, 8]], [[2, 4]])], n_tokens=10)
    statistics.save(path)
    again = GeneStatistics.load(path)
    np.testing.assert_array_equal(again.occurrences, statistics.occurrences)
    np.testing.assert_array_equal(again.rates, statistics.rates)


def test_the_baseline_equals_a_computation_by_hand() -> None:
    """Two genes, seen three times and once; the evaluated cell has both, and padding does not count."""
    statistics = GeneStatistics(np.array([0.0] * 7 + [3, 1]), np.array([1.0] * 7 + [2, 4]))
    evaluated = batch([[7, 8, PAD]], [[2.0, 4.0, 0.0]])
    found = measure_baseline(statistics, [evaluated], PAD, ModelConfig(1, 1, 4, 4, 9), LossConfig(), clip=30)
    total = 4 + 9 * 0.5
    assert found.gene_nll == pytest.approx(-(np.log(3.5 / total) + np.log(1.5 / total)) / 2)
    mu = torch.tensor([2.0, 4.0])
    by_rate = float(zero_truncated_poisson_nll(mu, mu, 1e-6, 30, True).mean())  # the shares of 6 are the same here
    assert found.count_nll == pytest.approx(by_rate, rel=1e-5)


def test_counts_by_share_of_the_total_are_better_if_depth_varies() -> None:
    statistics = GeneStatistics(np.ones(9), np.array([1.0] * 7 + [2, 4]))
    deep = batch([[7, 8, PAD]], [[10.0, 20.0, 0.0]])
    model = ModelConfig(1, 1, 4, 4, 9)
    found = measure_baseline(statistics, [deep], PAD, model, LossConfig(), clip=30)
    mu = torch.tensor([10.0, 20.0])
    assert found.count_nll == pytest.approx(float(zero_truncated_poisson_nll(mu, mu, 1e-6, 30, True).mean()), rel=1e-5)


def test_a_model_that_starts_from_frequencies_has_the_loss_of_the_baseline() -> None:
    loaded = load_checkpoint(CHECKPOINT, load_config(CHECKPOINT, {"model.inference_config.precision": "32"}))
    model, vocab = loaded.model, loaded.gene_vocab
    assert isinstance(model, TranscriptFormer)
    rng = np.random.default_rng(0)
    genes = [rng.choice(np.arange(7, len(vocab)), 30, replace=False).tolist() for _ in range(40)]
    counts = [rng.integers(1, 9, 30).astype(float).tolist() for _ in range(40)]
    statistics = GeneStatistics.from_tokens([tokens(genes, counts)], len(vocab))
    start_from_frequencies(model, statistics)
    evaluated = batch([[*cell, PAD] for cell in genes], [[*cell, 0.0] for cell in counts])
    evaluated = evaluated._replace(aux_tokens=torch.zeros(40, 1, dtype=torch.long))
    found = measure_baseline(statistics, [evaluated], vocab.pad, model.config, model.loss_config, clip=30)
    with torch.no_grad():
        encoded = model(evaluated.gene_tokens, evaluated.gene_counts, evaluated.aux_tokens)
        assert float(model.gene_nll(encoded).mean()) == pytest.approx(found.gene_nll, abs=1e-3)
        assert float(model.count_nll(encoded, 30).mean()) >= found.count_nll - 1e-4  # by share only


def test_a_baseline_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    Baseline(1.5, 2.5).save(path)
    assert Baseline.load(path) == (1.5, 2.5)
