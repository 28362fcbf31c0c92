"""Imputation equals the model's predictions of a gene put behind the cell."""

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

from tests.generation.checkpoints import load
from tests.golden_cases import CELLS
from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.errors import UsageError
from transcriptformer.generation.generate import generate
from transcriptformer.generation.impute import impute
from transcriptformer.model.transcriptformer import TranscriptFormer


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return load()


def some_cells(model: Checkpoint, n_genes: list[int]) -> anndata.AnnData:
    """Cells with random genes of the vocabulary, in its order."""
    random, names = np.random.default_rng(0), list(model.gene_vocab.genes)
    counts = np.zeros((len(n_genes), len(names)), np.float32)
    for row, n in zip(counts, n_genes, strict=True):
        row[random.choice(len(names), n, replace=False)] = random.integers(1, 40, n)
    cells = anndata.AnnData(sparse.csr_matrix(counts))
    cells.var_names = names
    return cells


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
        assert result.X[1, column] == pytest.approx(float(expected), rel=1e-4)
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
    assert (result.X[[0, 2, 3]] > 0).all()


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
