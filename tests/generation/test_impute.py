"""Imputation equals the model's predictions of a gene put behind the cell."""

import anndata
import numpy as np
import pytest
import torch
from scipy import stats

from tests.generation.checkpoints import load, some_cells
from tests.golden_cases import CELLS
from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.errors import TranscriptFormerError, UsageError
from transcriptformer.generation.generate import generate
from transcriptformer.generation.impute import count_if_expressed, impute
from transcriptformer.model.attention.definition import plain_attention
from transcriptformer.model.losses import MAX_LOGITS
from transcriptformer.model.transcriptformer import TranscriptFormer


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return load()


@pytest.mark.parametrize("link", ["softmax", "exp"])
def test_each_gene_is_seen_from_the_cell_alone(link: str) -> None:
    """The gene is put behind the cell, and the model's heads are asked as in training."""
    model = load(**{"model.model_config.mu_link_fn": link})
    network, n_special = model.model, len(model.gene_vocab.special_tokens)
    assert isinstance(network, TranscriptFormer)
    cells = some_cells(model, [9, 30])
    queried = [list(model.gene_vocab.genes)[i] for i in (3, 200, 150)]
    result = impute(cells, model, queried)
    order = np.random.default_rng([0, 1])
    own = cells.X[1].indices.copy()
    order.shuffle(own)  # as data.tokenize shuffles the second cell
    own_counts = np.minimum(cells.X[1].toarray()[0, own], 30)
    expected_p = []
    for column, gene in enumerate((3, 200, 150)):
        genes = torch.tensor([[*own, gene]]) + n_special
        counts = torch.tensor([[*own_counts, 1.0]])
        encoded = network(genes, counts, torch.tensor([[model.aux_vocabs["assay"].unknown]]))
        mu = network.expected_counts(encoded)[0]
        expected = own_counts.sum() * mu[-1] / mu[:-1].sum()
        assert result.layers["rate"][1, column] == pytest.approx(float(expected), rel=1e-4)
        expected_p.append(float(network.gene_logits(encoded.hidden[0, -1]).softmax(0)[gene + n_special]))
    np.testing.assert_allclose(result.layers["probability"][1], expected_p / np.sum(expected_p), rtol=1e-4)


def test_observed_counts_stay(model: Checkpoint) -> None:
    cells = some_cells(model, [20, 0, 200, 300])
    result = impute(cells, model)
    observed, is_observed = cells.X.toarray(), cells.X.toarray() > 0
    assert result.shape == cells.shape
    np.testing.assert_array_equal(result.X[is_observed], observed[is_observed])
    probability = result.layers["probability"]
    assert np.isnan(probability[is_observed]).all()
    np.testing.assert_allclose(np.nansum(probability, axis=1), 1, rtol=1e-5)
    assert np.isnan(result.X[1]).all()  # no count to go by
    assert (result.X[[0, 2, 3]] >= 1).all()
    assert (np.isnan(result.layers["rate"]) == (is_observed | (np.arange(4) == 1)[:, None])).all()


@pytest.mark.parametrize("mu", [1e-9, 0.02, 1.0, 40.0])
def test_counts_are_those_of_genes_that_are_expressed(mu: float) -> None:
    counts = np.arange(1, 200)
    expected = (counts * stats.poisson.pmf(counts, mu)).sum() / -np.expm1(-mu)
    assert count_if_expressed(np.array([mu]))[0] == pytest.approx(expected, rel=1e-5)


def test_long_cells_are_cut_before_the_position_of_the_end(model: Checkpoint) -> None:
    """The model sees the same if a cell has only the genes that are read."""
    cells = some_cells(model, [300])
    order = cells.X.indices.copy()
    np.random.default_rng([0, 0]).shuffle(order)
    result, gene = impute(cells, model), cells.X.toarray()[0] == 0
    network = model.model
    assert isinstance(network, TranscriptFormer)
    own, n_special = order[: network.max_genes - 1], len(model.gene_vocab.special_tokens)
    counts = torch.from_numpy(np.minimum(cells.X.toarray()[:, [*own, 0]], 30))
    genes = torch.from_numpy(np.append(own + n_special, model.gene_vocab.pad)).long()[None]
    encoded = network(genes, counts, torch.tensor([[model.aux_vocabs["assay"].unknown]]))
    p = network.gene_logits(encoded.hidden[0, -1]).softmax(0).numpy()[n_special:][gene]
    np.testing.assert_allclose(result.layers["probability"][0, gene], p / p.sum(), rtol=1e-4)


def test_only_cells_that_pass_the_filters_are_imputed(caplog: pytest.LogCaptureFixture) -> None:
    cells = some_cells(load(), [9, 40, 50])
    cells.X.data[0] = 1.5
    model = load(min_expressed_genes=30)
    result = impute(cells, model, [cells.var_names[0]])
    assert list(result.obs_names) == ["1", "2"]
    assert "counts are not integers" in caplog.text
    assert list(generate(model, data=cells).obs_names) == ["1", "2"]
    assert set(generate(model, 20, like=cells).obs["n_genes"]) == {40, 50}


def test_the_attention_is_that_of_the_settings() -> None:
    model = load(**{"model.inference_config.attention": "plain"})
    network = model.model
    assert isinstance(network, TranscriptFormer)
    cells, previous = some_cells(model, [9]), network.transformer_encoder.attention
    assert previous is not plain_attention
    impute(cells, model)
    assert network.transformer_encoder.attention is plain_attention
    network.transformer_encoder.attention = previous
    generate(model, like=cells)
    assert network.transformer_encoder.attention is plain_attention


def test_batches_that_run_out_of_memory_are_halved(model: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    def allocate(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) > 2:
            raise RuntimeError("CUDA out of memory")

    cells = some_cells(model, [20, 21, 22, 23, 24])
    expected, scarce = impute(cells, model), load()
    scarce.model.register_forward_pre_hook(allocate)
    result = impute(cells, scarce)
    assert "halving the batch" in caplog.text
    np.testing.assert_allclose(result.X, expected.X, rtol=1e-4)


def test_heads_run_on_a_few_cells_at_once(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = some_cells(model, [20, 21, 22])
    expected = impute(cells, model)
    monkeypatch.setitem(MAX_LOGITS, "cpu", 2 * len(model.gene_vocab))
    result = impute(cells, model)
    np.testing.assert_allclose(result.X, expected.X, rtol=1e-4)
    np.testing.assert_allclose(result.layers["probability"], expected.layers["probability"], rtol=1e-4)


@pytest.mark.parametrize("head", ["gene_id_head", "mu.mlp"])
def test_predictions_that_overflow_are_refused(head: str) -> None:
    model = load()
    with torch.no_grad():
        next(model.model.get_submodule(head).parameters())[0] = torch.inf
    with pytest.raises(TranscriptFormerError, match="are NaN or infinite"):
        impute(some_cells(model, [9]), model)


def test_batches_and_blocks_do_not_matter(model: Checkpoint) -> None:
    one = impute(CELLS, model)
    other = impute(CELLS, load(block_size=5, **{"model.inference_config.batch_size": 2}))
    np.testing.assert_allclose(one.X, other.X, rtol=1e-4)
    np.testing.assert_allclose(one.layers["probability"], other.layers["probability"], rtol=1e-4)
    assert list(one.obs_names) == list(anndata.read_h5ad(CELLS).obs_names)


def test_cells_may_share_a_name(model: Checkpoint) -> None:
    cells = some_cells(model, [5, 6])
    with anndata.settings.override(check_uniqueness=False):
        cells.obs_names = ["a", "a"]
    assert list(impute(cells, model, [cells.var_names[0]]).obs_names) == ["a", "a"]
    assert list(generate(model, data=cells, n_genes=8, total_counts=99).obs_names) == ["a", "a"]


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        ("some", "'some' must be 'all' or a list"),
        ([], "at least one gene"),
        (["NOPE"], "not in the checkpoint's vocabulary"),
        (["ENSG00000100291", "ENSG00000100291"], "occurs twice"),
    ],
)
def test_queries_that_cannot_be_used(genes: str | list[str], message: str, model: Checkpoint) -> None:
    with pytest.raises(UsageError, match=message):
        impute(CELLS, model, genes)
