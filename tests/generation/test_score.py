"""Likelihoods of real cells: what they sum to, over which orders, and of which genes."""

import subprocess
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner, Result

import transcriptformer as tf
from tests.commands import COMMAND, finish, read_result, start
from tests.generation.checkpoints import load, without_gene_head
from tests.golden_cases import CELLS, CHECKPOINT
from tests.h5ad_files import make_adata, random_adata
from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.cli.main import app
from transcriptformer.errors import UsageError
from transcriptformer.generation.next_genes import next_genes
from transcriptformer.generation.score import Score, score
from transcriptformer.model.losses import count_surprise
from transcriptformer.runs.run import survey_sources

NLL = ["gene_nll", "count_nll"]


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return load()


def invoke(*options: object) -> Result:
    fixed = ["score", "--checkpoint-path", CHECKPOINT, "--device", "cpu", "--precision", "32"]
    return CliRunner().invoke(app, [str(part) for part in (*fixed, *options)])


def test_a_cell_is_as_likely_as_its_genes_one_after_the_other(model: Checkpoint) -> None:
    adata = random_adata(2)
    scored = score(adata, model, orders=0).obs["gene_nll"]
    for i, assay in enumerate(adata.obs["assay"]):
        row = adata.X[i].toarray().ravel()
        pairs = [(adata.var["ensembl_id"].iloc[j], min(row[j], 30)) for j in np.flatnonzero(row)]
        known = [pair for pair in pairs if pair[0] in model.gene_vocab.genes]
        following = next_genes(model, [known[:n] for n in range(len(known))], assay=assay)
        steps = [following[n, gene].X.item() for n, (gene, _) in enumerate(known)]
        assert scored.iloc[i] == pytest.approx(-np.mean(steps), abs=1e-5)


def test_counts_are_as_likely_as_those_of_a_zero_truncated_poisson_distribution() -> None:
    mu, counts = np.meshgrid([1e-3, 0.1, 0.5, 1, 7, 40], [1, 2, 5, 30])
    expected = stats.poisson.logsf(0, mu) - stats.poisson.logpmf(counts, mu)
    found = count_surprise(torch.from_numpy(mu), torch.from_numpy(counts.astype(float)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_scores_of_another_number_of_orders_do_not_stay(model: Checkpoint) -> None:
    adata = anndata.read_h5ad(CELLS)
    tf.score(adata, model, orders=2)
    assert "gene_nll_se" in adata.obs
    assert "gene_nll_se" not in score(adata, model, orders=1).obs
    tf.score(adata, model, orders=1)
    assert "gene_nll_se" not in adata.obs


def test_perplexity_is_that_of_the_mean_surprise(model: Checkpoint) -> None:
    obs = score(CELLS, model, orders=3).obs
    np.testing.assert_allclose(obs["perplexity"], np.exp(obs["gene_nll"]))
    assert (obs["gene_nll_se"].dropna() >= 0).all()
    assert (obs[["gene_nll_se", "count_nll_se"]] > 0).mean().min() > 0.8  # all but cells of one gene, or of none


def test_orders_are_the_mean_over_seeded_orders(model: Checkpoint) -> None:
    """The first two of three orders are those of a run with two."""
    one, two, three = (score(CELLS, model, orders=n).obs for n in (1, 2, 3))
    assert not np.allclose(one["gene_nll"], two["gene_nll"], rtol=1e-4)
    distance = abs(one["gene_nll"] - two["gene_nll"])  # half that of the two orders, as is their standard error
    np.testing.assert_allclose(distance, two["gene_nll_se"], atol=2e-6)
    assert not np.allclose(two["gene_nll"], three["gene_nll"], rtol=1e-4)
    assert not np.allclose(one["gene_nll"], score(CELLS, model, seed=1).obs["gene_nll"], rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_do_not_depend_on_the_batch(model: Checkpoint, batch_size: int) -> None:
    small = load(**{"model.inference_config.batch_size": batch_size})
    obs, expected = score(CELLS, small, orders=2).obs, score(CELLS, model, orders=2).obs
    np.testing.assert_allclose(obs[NLL], expected[NLL], atol=1e-5)


def test_scores_per_gene_average_to_those_of_cells(model: Checkpoint) -> None:
    genes, cells = score(CELLS, model, orders=2, per_gene="gene").obs, score(CELLS, model, orders=2).obs
    survey = survey_sources(CELLS, Score(model)).survey
    n_scored = survey.lengths[survey.kept].clip(max=model.config.model.model_config.seq_len - 1)
    assert list(genes.columns) == ["gene", "n_cells", *NLL]
    assert genes["n_cells"].sum() == n_scored.sum()
    np.testing.assert_allclose(
        (genes["gene_nll"] * genes["n_cells"]).sum(), (cells["gene_nll"] * n_scored).sum(), rtol=1e-5
    )


def test_scores_per_group_have_a_row_for_each_gene_and_group(model: Checkpoint) -> None:
    adata = random_adata(12)
    adata.obs["type"] = ["a", "b", "c"] * 4
    result = score(adata, model, per_gene="type")
    assert set(result.obs["type"]) == {"a", "b", "c"}
    assert result.obs_names[0].endswith(" | a")


def test_a_cell_that_fills_the_model_is_scored_without_its_last_gene(model: Checkpoint) -> None:
    """The model has learned to end there."""
    seq_len = model.config.model.model_config.seq_len
    known = list(model.gene_vocab.genes)
    counts = np.ones((2, seq_len), np.float32)
    counts[1, -1] = 0
    adata = anndata.AnnData(counts)
    adata.var_names = known[:seq_len]
    full, cut = score(adata, model, orders=0).obs["gene_nll"]
    assert full == pytest.approx(cut, abs=1e-5)


def test_cells_without_genes_have_no_score(model: Checkpoint) -> None:
    adata = make_adata([[1, 2, 3], [0, 0, 0], [4, 5, 6]])
    tf.score(adata, model, orders=2)
    assert adata.obs["gene_nll"].isna().tolist() == [False, True, False]
    assert adata.obs["perplexity"].isna().tolist() == [False, True, False]


def test_an_anndata_gets_the_scores_of_its_file(model: Checkpoint) -> None:
    adata = anndata.read_h5ad(CELLS)
    copy = tf.score(adata, model, copy=True)
    assert copy is not None
    assert "gene_nll" not in adata.obs
    np.testing.assert_array_equal(copy.obs[NLL], score(CELLS, model).obs[NLL])
    assert "config" in copy.uns["transcriptformer_score"]


def test_the_command_writes_what_the_function_returns(model: Checkpoint, tmp_path: Path) -> None:
    done = invoke(CELLS, "--orders", 2, "--output-path", tmp_path, "--output-filename", "s.zarr")
    assert done.exit_code == 0, done.output
    result, expected = anndata.read_zarr(tmp_path / "s.zarr"), score(CELLS, model, orders=2)
    np.testing.assert_allclose(result.obs[NLL], expected.obs[NLL], atol=1e-5)
    assert list(result.obs.columns) == list(expected.obs.columns)
    done = invoke(CELLS, "--per-gene", "gene", "--output-path", tmp_path, "--output-filename", "genes.h5ad")
    assert "gene rows: obs gene_nll, count_nll" in done.output
    np.testing.assert_allclose(
        anndata.read_h5ad(tmp_path / "genes.h5ad").obs[NLL], score(CELLS, model, per_gene="gene").obs[NLL], atol=1e-5
    )


def command(*options: object) -> list[str]:
    fixed = (
        COMMAND,
        "score",
        "--checkpoint-path",
        CHECKPOINT,
        "--device",
        "cpu",
        "--precision",
        "32",
        "--batch-size",
        4,
    )
    return [str(part) for part in (*fixed, *options)]


def run(*options: object, kill_after: float | None = None) -> subprocess.CompletedProcess[str]:
    return finish(start(command(*options)), kill_after)


@pytest.mark.slow
def test_two_processes_score_like_one(tmp_path: Path) -> None:
    random_adata(30).write_h5ad(tmp_path / "cells.h5ad")
    for n in (1, 2):
        done = run(tmp_path / "cells.h5ad", "--num-gpus", n, "--orders", 2, "--output-path", tmp_path / str(n))
        assert done.returncode == 0, done.stderr
    one, two = (read_result(tmp_path / str(n) / "scores.h5ad") for n in (1, 2))
    np.testing.assert_allclose(two.obs[NLL], one.obs[NLL], atol=1e-5)


def test_a_resumed_run_scores_only_what_is_left_and_only_with_the_same_orders(tmp_path: Path) -> None:
    random_adata(100).write_h5ad(tmp_path / "cells.h5ad")
    options = (tmp_path / "cells.h5ad", "--output-path", tmp_path / "out")
    process = start(command(*options, "--orders", 20))
    parts = tmp_path / "out" / "scores.h5ad.parts"
    while not list(parts.glob("piece-*")) and process.poll() is None:
        pass
    process.kill()
    finish(process)
    assert parts.exists()
    other = run(*options, "--orders", 19, "--resume")
    assert other.returncode == 2
    assert "orders" in other.stderr
    done = run(*options, "--orders", 20, "--resume")
    assert done.returncode == 0, done.stderr
    assert "cells are already done" in done.stderr
    expected = score(tmp_path / "cells.h5ad", load(), orders=20)
    np.testing.assert_allclose(read_result(tmp_path / "out" / "scores.h5ad").obs[NLL], expected.obs[NLL], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--orders", -1), "--orders: must be from 0 to 1,000, not -1"),
        (("--per-gene", "no such column"), "--per-gene no such column: obs has no such column"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(options: tuple[object, ...], message: str, tmp_path: Path) -> None:
    done = invoke(CELLS, *options, "--output-path", tmp_path / "out")
    assert done.exit_code in (1, 2)
    assert f"ERROR: {message}" in done.stderr
    assert list(tmp_path.rglob("*.h5ad*")) == []


def test_a_checkpoint_without_a_gene_head_is_refused(checkpoint_copy: Path) -> None:
    with pytest.raises(tf.TranscriptFormerError, match="has no gene head"):
        score(CELLS, load(without_gene_head(checkpoint_copy)))


def test_a_negative_seed_is_refused(model: Checkpoint) -> None:
    with pytest.raises(UsageError, match="--seed: must be from 0"):
        Score(model, seed=-1)
