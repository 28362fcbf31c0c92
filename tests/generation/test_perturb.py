"""In-silico perturbations: what moves, what does not, and what has no result."""

import subprocess
from contextlib import nullcontext
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.stats import false_discovery_control
from typer.testing import CliRunner, Result

import transcriptformer as tf
from tests.commands import COMMAND, finish, read_result, start
from tests.generation.checkpoints import load, without_gene_head
from tests.golden_cases import CHECKPOINT, SYNTHETIC
from tests.h5ad_files import GENES, make_adata, random_adata
from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.cli.main import app
from transcriptformer.errors import TranscriptFormerError, UsageError
from transcriptformer.generation.effects import bootstrap_interval
from transcriptformer.generation.perturb import Perturb, perturb
from transcriptformer.generation.shift_module import cosine_shift as cosine_shift_of
from transcriptformer.model.label_head import LabelHead
from transcriptformer.runs.recording import MemoryRecorder, Recording
from transcriptformer.storage.results import Field

TABLE = "perturbation_table"


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return load()


def shifts_of(adata: anndata.AnnData) -> np.ndarray:
    return np.asarray(adata.obsm["cosine_shift"])


def embedded(adata: anndata.AnnData, model: Checkpoint) -> np.ndarray:
    result = tf.embed(adata, model, copy=True)
    assert result is not None
    return np.asarray(result.obsm["X_transcriptformer"], np.float64)


def cosine_shift(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return 1 - (one * other).sum(1) / norms


def with_counts(adata: anndata.AnnData, gene: str, count: float, where: np.ndarray | slice) -> anndata.AnnData:
    """Copy in which some cells have another count of a gene."""
    counts = adata.X.toarray()
    counts[where, GENES.index(gene)] = count
    changed = adata.copy()
    changed.X = sparse.csr_matrix(counts)
    return changed


def test_a_knock_out_is_the_cell_without_the_gene(model: Checkpoint) -> None:
    adata = random_adata(30)
    result = perturb(adata, model, [GENES[3], GENES[150]])
    for i, gene in enumerate((GENES[3], GENES[150])):
        is_expressed = adata.X.toarray()[:, GENES.index(gene)] > 0
        expected = cosine_shift(embedded(adata, model), embedded(with_counts(adata, gene, 0, slice(None)), model))
        np.testing.assert_array_equal(np.isnan(shifts_of(result)[:, i]), ~is_expressed)
        np.testing.assert_allclose(shifts_of(result)[is_expressed, i], expected[is_expressed], atol=1e-5)
        assert shifts_of(result)[is_expressed, i].min() > 1e-7
    assert list(result.uns["perturbations"]) == [f"knock-out {GENES[3]}", f"knock-out {GENES[150]}"]


def test_a_cell_with_more_genes_than_positions_moves_as_without_the_gene(model: Checkpoint) -> None:
    """The gene after the last one that is seen moves up."""
    seq_len = model.config.model.model_config.seq_len
    adata = make_adata(np.random.default_rng(0).integers(1, 60, (2, seq_len + 2)), GENES[: seq_len + 2])
    chosen = [GENES[0], GENES[seq_len - 2], GENES[seq_len - 1], GENES[seq_len]]
    shifts = shifts_of(perturb(adata, model, chosen))
    for i, gene in enumerate(chosen[:2]):
        expected = cosine_shift(embedded(adata, model), embedded(with_counts(adata, gene, 0, slice(None)), model))
        np.testing.assert_allclose(shifts[:, i], expected, atol=1e-5)
    assert shifts[:, 2].tolist() == [0, 0], "the last position is no input"
    assert np.isnan(shifts[:, 3]).all(), "no position"


def test_a_count_that_is_set_is_that_of_a_file(model: Checkpoint) -> None:
    adata = random_adata(30)
    counts = adata.X.toarray()
    present, last = GENES[3], GENES[199]
    result = perturb(adata, model, set_counts={present: 7, last: 20})
    for i, (gene, count) in enumerate(((present, 7), (last, 20))):
        chosen = counts[:, GENES.index(gene)] > 0 if gene == present else np.ones(30, bool)
        expected = cosine_shift(embedded(adata, model), embedded(with_counts(adata, gene, count, chosen), model))
        np.testing.assert_allclose(shifts_of(result)[chosen, i], expected[chosen], atol=1e-5)
    assert np.isfinite(shifts_of(result)).all(), "absent genes are added"
    first = perturb(adata, model, set_counts={GENES[0]: 20}, at="start")
    expected = cosine_shift(embedded(adata, model), embedded(with_counts(adata, GENES[0], 20, slice(None)), model))
    np.testing.assert_allclose(shifts_of(first)[:, 0], expected, atol=1e-5)


def test_a_gene_that_is_added_to_a_full_cell_takes_the_last_position_that_is_read(model: Checkpoint) -> None:
    seq_len = model.config.model.model_config.seq_len
    adata = make_adata(np.full((1, seq_len), 3))
    added = GENES[seq_len]
    shifts = [shifts_of(perturb(adata, model, set_counts={added: 5}, at=at)).item() for at in ("end", "start")]
    counts = np.full((1, seq_len), 3)
    counts[0, -1] = 5
    end = make_adata(counts, [*GENES[: seq_len - 2], GENES[seq_len - 2], added])
    end = end[:, [*range(seq_len - 2), seq_len - 1, seq_len - 2]].copy()
    counts = np.full((1, seq_len + 1), 3)
    counts[0, 0] = 5
    beginning = make_adata(counts, [added, *GENES[:seq_len]])
    expected = [cosine_shift(embedded(adata, model), embedded(other, model)).item() for other in (end, beginning)]
    np.testing.assert_allclose(shifts, expected, atol=1e-6)
    assert min(shifts) > 1e-7


def test_the_present_count_moves_nothing_at_all(model: Checkpoint) -> None:
    adata = make_adata([[1, 2, 3], [4, 100, 6]])
    shifts = shifts_of(perturb(adata, model, set_counts={GENES[0]: 1, GENES[1]: 30}))
    assert shifts[0, 0] == 0
    assert shifts[1, 1] == 0, "counts are clipped at 30"
    assert (shifts[[1, 0], [0, 1]] > 0).all()


def test_a_gene_that_is_not_expressed_and_a_cell_without_other_genes_have_no_shift(
    model: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    cells = make_adata([[1, 2, 3], [0, 5, 0], [0, 0, 0], [4, 0, 6]])
    result = perturb(cells, model, [GENES[1], GENES[9]])
    assert f"no cell expresses: knock-out {GENES[9]}" in caplog.text
    assert f"no genes are left in 1 cells by knock-out {GENES[1]}; their shifts are missing" in caplog.text
    assert np.isnan(shifts_of(result)[:, 0]).tolist() == [False, True, True, True]
    row = result.uns[TABLE].iloc[0]
    assert row[["n_cells", "n_expressing", "n_emptied"]].tolist() == [4, 2, 1]
    assert row["mean"] == row["median"] == pytest.approx(shifts_of(result)[0, 0])
    assert np.isnan(row["ci_low"])


def test_a_knock_out_of_the_last_gene_leaves_the_states_before_it(model: Checkpoint) -> None:
    task = Perturb(model, [GENES[2]])
    module = task.make_module()
    network = module.model
    genes = torch.tensor([[model.gene_vocab.genes[gene] for gene in GENES[:3]] + [model.gene_vocab.pad] * 5])
    counts, aux = torch.tensor([[1.0, 2, 3, 0, 0, 0, 0, 0]]), torch.tensor([[0] * len(model.aux_vocabs)])
    without = genes.clone()
    without[:, 2] = model.gene_vocab.pad
    with torch.inference_mode():
        one = network(genes, counts, aux, bias_on_diagonal=True).hidden
        other = network(without, counts * (without != model.gene_vocab.pad), aux, bias_on_diagonal=True).hidden
    torch.testing.assert_close(one[:, :3], other[:, :3], atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_shifts_do_not_depend_on_the_batch(model: Checkpoint, batch_size: int) -> None:
    small = load(**{"model.inference_config.batch_size": batch_size})
    adata, genes = random_adata(20), GENES[:50]
    one, other = (perturb(adata, m, genes, {GENES[60]: 3}, null=10) for m in (model, small))
    np.testing.assert_allclose(shifts_of(other), shifts_of(one), atol=1e-6)
    pd.testing.assert_frame_equal(other.uns[TABLE], one.uns[TABLE], rtol=1e-3, atol=1e-6)


def test_a_table_summarizes_groups(model: Checkpoint) -> None:
    adata = random_adata(40, density=0.7)
    adata.obs["type"] = pd.Categorical(["b", "a", "b", None] * 10)
    result = perturb(adata, model, GENES[:2], groupby="type", seed=5)
    table, shifts = result.uns[TABLE], shifts_of(result)
    assert table["group"].tolist() == ["all", "a", "b"] * 2
    assert table["n_cells"].tolist() == [40, 10, 20] * 2
    for (name, group), row in table.set_index(["perturbation", "group"]).iterrows():
        in_group = np.ones(40, bool) if group == "all" else (adata.obs["type"] == group).to_numpy()
        known = shifts[in_group, list(result.uns["perturbations"]).index(name)]
        known = known[~np.isnan(known)]
        assert row["n_expressing"] == len(known)
        np.testing.assert_allclose([row["mean"], row["median"]], [known.mean(), np.median(known)], rtol=1e-5)
        assert known.min() <= row["ci_low"] <= row["mean"] <= row["ci_high"] <= known.max()
    pd.testing.assert_frame_equal(table, perturb(adata, model, GENES[:2], groupby="type", seed=5).uns[TABLE])


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(values, np.random.default_rng(1))
    assert high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.1)
    assert low < values.mean() < high


def test_a_null_knocks_out_genes_of_like_expression_in_the_same_cells(model: Checkpoint) -> None:
    adata = random_adata(30)
    adata.obs["type"] = ["a", "b"] * 15
    task = Perturb(model, GENES[:2], groupby="type", null=10)
    result = tf.perturb(adata, model, knock_out=GENES[:2], groupby="type", null=10, copy=True)
    assert result is not None
    table = result.uns[TABLE]
    assert table["z"].notna().all()
    assert table["p"].between(2 / 11, 1).all()
    np.testing.assert_allclose(table["q"], false_discovery_control(table["p"]), rtol=1e-5)
    one = perturb(adata[adata.obs["type"] == "a"].copy(), model, GENES[:2], null=10).uns[TABLE]
    assert (one["null_mean"] / table["null_mean"][table["group"] == "a"].to_numpy()).between(0.2, 5).all()
    assert task.settings["null"] == 10


def test_the_null_is_the_mean_over_its_genes(model: Checkpoint) -> None:
    """With all other genes as the null, it is the mean of their own means."""
    adata = random_adata(10, n_genes=13, density=0.7)
    own = perturb(adata, model, GENES[:1], null=12).uns[TABLE].iloc[0]
    others = perturb(adata, model, GENES[1:13]).uns[TABLE]["mean"]
    assert own["null_mean"] == pytest.approx(others.mean(), rel=1e-4)
    assert own["z"] == pytest.approx((own["mean"] - others.mean()) / others.std(), rel=1e-3)


def test_a_group_that_expresses_too_few_genes_has_no_null(model: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    table = perturb(random_adata(10, n_genes=5), model, GENES[:1], null=10).uns[TABLE]
    assert table["z"].isna().all()
    assert "all: only 4 other genes are expressed, too few for a null" in caplog.text


def test_an_anndata_keeps_filtered_cells(model: Checkpoint) -> None:
    few = load(min_expressed_genes=3)
    adata = make_adata([[1, 2, 3], [0, 5, 1], [4, 1, 6]])
    tf.perturb(adata, few, knock_out=[GENES[1]])
    assert np.isnan(shifts_of(adata)[:, 0]).tolist() == [False, True, False]
    assert "config" in adata.uns["transcriptformer_perturb"]


def test_a_checkpoint_without_a_gene_head_has_the_same_shifts(model: Checkpoint, checkpoint_copy: Path) -> None:
    adata = random_adata(5)
    shifts = shifts_of(perturb(adata, load(without_gene_head(checkpoint_copy)), GENES[:5]))
    np.testing.assert_allclose(shifts, shifts_of(perturb(adata, model, GENES[:5])), atol=1e-6)


def test_a_new_species_is_perturbed_as_embedded() -> None:
    files = [str(SYNTHETIC / "other_species_gene.h5")]
    model = load(**{"model.inference_config.pretrained_embedding": files})
    genes = list(model.gene_vocab.genes)[:40]
    counts = np.random.default_rng(0).integers(1, 9, (5, 40))
    adata, without = (make_adata(counts * keep, genes) for keep in (1, np.arange(40) != 7))
    expected = cosine_shift(embedded(adata, model), embedded(without, model))
    np.testing.assert_allclose(shifts_of(perturb(adata, model, [genes[7]]))[:, 0], expected, atol=1e-6)


def test_a_label_head_tells_the_mean_change_of_each_probability(checkpoint_copy: Path) -> None:
    torch.manual_seed(0)
    torch.save(LabelHead("donor", ["x", "y"], 32).to_file(), checkpoint_copy / "label_head.pt")
    model, adata = load(checkpoint_copy), random_adata(20)
    adata.obs["type"] = ["a", "b"] * 10
    labels = perturb(adata, model, GENES[:2], groupby="type").uns["perturbation_labels"]
    assert labels.drop(columns="mean_change").apply(tuple, axis=1).tolist() == [
        (f"knock-out {gene}", group, label) for gene in GENES[:2] for group in ("all", "a", "b") for label in "xy"
    ]
    is_expressed = adata.X.toarray()[:, 1] > 0
    assert model.label_head is not None
    probabilities = [
        model.label_head(torch.from_numpy(embedded(cells, model)[is_expressed]).float()).softmax(1).detach().numpy()
        for cells in (adata, with_counts(adata, GENES[1], 0, slice(None)))
    ]
    expected = (probabilities[1] - probabilities[0]).mean(0)
    np.testing.assert_allclose(labels["mean_change"][6:8], expected, atol=1e-6)


def test_an_embedding_that_overflows_is_not_a_missing_shift() -> None:
    shift = cosine_shift_of(torch.ones(2, 3), torch.tensor([[1.0, 1, 1], [torch.nan, 1, 1]]))
    assert shift.tolist() == [0, torch.inf]
    layout = {"shift": Field("float32", may_be_missing=True)}
    for values, is_valid in (([0.0, np.nan], True), (shift.tolist(), False)):
        recording = Recording(MemoryRecorder(layout, 2), layout, np.ones(2, int))
        with nullcontext() if is_valid else pytest.raises(TranscriptFormerError, match="rows 1 of"), recording:
            recording.add({"rows": torch.arange(2), "shift": torch.tensor(values)})


def invoke(*options: object) -> Result:
    fixed = ["perturb", "--checkpoint-path", CHECKPOINT, "--device", "cpu", "--precision", "32"]
    return CliRunner().invoke(app, [str(part) for part in (*fixed, *options)])


def test_the_command_writes_what_the_function_returns(model: Checkpoint, tmp_path: Path) -> None:
    adata = random_adata(12)
    adata.obs["type"] = ["a", "b", "c"] * 4
    adata.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "genes.txt").write_text(f"{GENES[1]}\n{GENES[2]}  # another\n")
    options = ["--knock-out", GENES[0], "--knock-out-each", tmp_path / "genes.txt", "--set", f"{GENES[3]}=4"]
    options += ["--groupby", "type", "--null", 10, "--output-path", tmp_path, "--plot", tmp_path / "effects.png"]
    expected = perturb(adata, model, GENES[:3], {GENES[3]: 4}, groupby="type", null=10)
    for name in ("p.zarr", "p.h5ad"):
        done = invoke(tmp_path / "cells.h5ad", *options, "--output-filename", name)
        assert done.exit_code == 0, done.output
        assert "12 cells, 4 perturbations: obsm['cosine_shift']" in done.output
        result = read_result(tmp_path / name)
        np.testing.assert_allclose(shifts_of(result), shifts_of(expected), atol=1e-6)
        assert list(result.uns["perturbations"]) == list(expected.uns["perturbations"])
        for table in (result.uns[TABLE].reset_index(drop=True), pd.read_csv(tmp_path / "p.csv")):
            pd.testing.assert_frame_equal(table, expected.uns[TABLE], check_dtype=False, rtol=1e-3, atol=1e-6)
        pd.testing.assert_frame_equal(result.obs, expected.obs, check_dtype=False)
    assert (tmp_path / "effects.png").read_bytes().startswith(b"\x89PNG")


def command(*options: object) -> list[str]:
    fixed = (COMMAND, "perturb", "--checkpoint-path", CHECKPOINT, "--device", "cpu", "--precision", "32")
    return [str(part) for part in (*fixed, "--batch-size", 4, *options)]


def run(*options: object) -> subprocess.CompletedProcess[str]:
    return finish(start(command(*options)))


@pytest.mark.slow
def test_two_processes_perturb_like_one(tmp_path: Path) -> None:
    random_adata(30).write_h5ad(tmp_path / "cells.h5ad")
    for n in (1, 2):
        options = ("--num-gpus", n, "--knock-out", GENES[0], "--null", 10, "--output-path", tmp_path / str(n))
        done = run(tmp_path / "cells.h5ad", *options)
        assert done.returncode == 0, done.stderr
    one, two = (read_result(tmp_path / str(n) / "perturbations.h5ad") for n in (1, 2))
    np.testing.assert_allclose(shifts_of(two), shifts_of(one), atol=1e-6)
    pd.testing.assert_frame_equal(two.uns[TABLE], one.uns[TABLE], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_resumed_run_perturbs_only_what_is_left_and_only_in_the_same_way(tmp_path: Path) -> None:
    random_adata(100).write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "genes.txt").write_text("\n".join(GENES[:100]))
    options = (tmp_path / "cells.h5ad", "--output-path", tmp_path / "out")
    each = ("--knock-out-each", tmp_path / "genes.txt")
    process = start(command(*options, *each))
    parts = tmp_path / "out" / "perturbations.h5ad.parts"
    while not list(parts.glob("piece-*")) and process.poll() is None:
        pass
    process.kill()
    finish(process)
    assert parts.exists()
    other = run(*options, "--knock-out", GENES[0], "--resume")
    assert other.returncode == 2
    assert "perturbations" in other.stderr
    done = run(*options, *each, "--resume")
    assert done.returncode == 0, done.stderr
    assert "cells are already done" in done.stderr
    expected = perturb(tmp_path / "cells.h5ad", load(), GENES[:100])
    result = read_result(tmp_path / "out" / "perturbations.h5ad")
    np.testing.assert_allclose(shifts_of(result), shifts_of(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to perturb: give --knock-out, --knock-out-each or --set"),
        (("--knock-out", "ENSG0"), "--knock-out: 1 gene is not in the checkpoint's vocabulary: 'ENSG0'"),
        (("--knock-out", GENES[0], "--knock-out", GENES[0]), f"--knock-out: gene {GENES[0]} occurs twice"),
        (("--knock-out-each", "missing.txt"), "--knock-out-each missing.txt: no such file"),
        (("--set", GENES[0]), f"--set {GENES[0]}: has no count; give GENE=COUNT"),
        (("--set", f"{GENES[0]}=x"), f"--set {GENES[0]}=x: 'x' is not a count"),
        (("--set", f"{GENES[0]}=-1"), f"--set: count -1 of {GENES[0]} is not a whole number of at least 1"),
        (("--set", f"{GENES[0]}=1.5"), f"--set: count 1.5 of {GENES[0]} is not a whole number of at least 1"),
        (("--set", f"{GENES[0]}=1", "--set", f"{GENES[0]}=2"), f"--set: gene {GENES[0]} occurs twice"),
        (("--knock-out", GENES[0], "--at", "middle"), "--at middle: must be end or start"),
        (("--knock-out", GENES[0], "--null", 3), "--null 3: too few"),
        (("--knock-out", GENES[0], "--seed", -1), "--seed: must be from 0"),
        (("--knock-out", GENES[0], "--groupby", "no"), "--groupby no: obs has no such column"),
        (("--knock-out", GENES[0], "--plot", "effects.txt"), "--plot effects.txt: must end in .png"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(options: tuple[object, ...], message: str, tmp_path: Path) -> None:
    random_adata(3).write_h5ad(tmp_path / "cells.h5ad")
    done = invoke(tmp_path / "cells.h5ad", *options, "--output-path", tmp_path / "out")
    assert done.exit_code in (1, 2)
    assert f"ERROR: {message}" in done.stderr
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["cells.h5ad"]


def test_scaled_counts_can_be_knocked_out_but_not_set() -> None:
    scaled = load(normalize_to_scale=100)
    with pytest.raises(UsageError, match="--set: the checkpoint was trained on counts scaled"):
        Perturb(scaled, set_counts={GENES[0]: 1})
    assert np.isfinite(shifts_of(perturb(make_adata([[1, 2]]), scaled, [GENES[0]]))).all()
