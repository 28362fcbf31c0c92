"""PMI is the difference of two prompts, of genes and averaged over cells."""

import anndata
import numpy as np
import pytest
from scipy.stats import mannwhitneyu

import transcriptformer
from tests.generation.checkpoints import load
from tests.generation.test_next_genes import random_prompts
from tests.golden_cases import CELLS
from tests.h5ad_files import GENES, make_adata, random_adata
from transcriptformer.demo.run import CHECKPOINT as DEMO
from transcriptformer.errors import DataError, UsageError
from transcriptformer.generation.cells import read_groups
from transcriptformer.generation.next_genes import next_genes
from transcriptformer.generation.pmi import pmi
from transcriptformer.generation.prompts import GeneCount

SOURCES, TARGETS = [GENES[7], "LGALS1", GENES[3]], [GENES[0], GENES[3], GENES[40], GENES[41]]


def of(adata: anndata.AnnData, group: str, n_genes: int = 124) -> list[list[tuple[str, float]]]:
    """Return the prompts of the cells of a group."""
    rows = adata[adata.obs["group"] == group]
    return [[(GENES[j], min(float(row[j]), 30)) for j in np.flatnonzero(row)[:n_genes]] for row in np.asarray(rows.X)]


@pytest.fixture
def cells() -> anndata.AnnData:
    adata = random_adata(24, n_genes=100)
    adata.X = adata.X.toarray()
    adata.obs["group"] = ["a", "b", "c"] * 8
    return adata


@pytest.mark.parametrize("n_context", [0, 1, 30, 124])
def test_pmi_is_the_difference_of_two_prompts(n_context: int) -> None:
    checkpoint = load()
    others = [gene for gene in GENES if gene not in (*SOURCES, *TARGETS, "ENSG00000100097")]
    context: list[GeneCount] = [(gene, i % 5 + 1) for i, gene in enumerate(others[:n_context])]
    result = pmi(checkpoint, [(SOURCES[0], 4), *SOURCES[1:]], TARGETS, context=context, assay="Drop-seq")
    with_sources: list[list[GeneCount]] = [[*context, (SOURCES[0], 4)], [*context, SOURCES[1]], [*context, SOURCES[2]]]
    prompts = next_genes(checkpoint, [*with_sources, context], assay="Drop-seq")[:, result.var_names].X
    expected = prompts[:3] - prompts[3]
    np.testing.assert_allclose(result.X, prompts[:3], atol=2e-5)
    np.testing.assert_allclose(result.layers["log_p_context"], np.tile(prompts[3], (3, 1)), atol=2e-5)
    assert np.isnan(result.layers["pmi"][2, 1]), "a gene and itself"
    assert np.isfinite(result.layers["log_p_context"]).all()
    expected[2, 1] = np.nan
    np.testing.assert_allclose(result.layers["pmi"], expected, atol=2e-5)
    assert result.obs["source"].tolist() == [GENES[7], "ENSG00000100097", GENES[3]]
    assert result.obs_names.tolist() == [f"{GENES[7]}=4", "ENSG00000100097", GENES[3]]
    assert result.obs["symbol"].iloc[1] == "LGALS1"
    assert result.obs["n_prompts"].tolist() == [1, 1, 1]
    assert set(result.layers) == {"pmi", "log_p_context"}


def test_genes_of_the_context_are_no_targets() -> None:
    result = transcriptformer.pmi(load(), [GENES[0]], context=[GENES[5], GENES[6]])
    assert result.n_vars == len(GENES)
    assert np.flatnonzero(np.isnan(result.layers["pmi"][0])).tolist() == [0, 5, 6]


def test_pmi_in_cells_is_that_of_mean_probabilities(cells: anndata.AnnData) -> None:
    checkpoint = load()
    result = pmi(checkpoint, SOURCES, TARGETS, context=cells, groupby="group")
    assert result.obs_names.tolist() == [f"{g} {s}" for g in "abc" for s in (GENES[7], "ENSG00000100097", GENES[3])]
    assert result.obs["context"].tolist() == [g for g in "abc" for _ in SOURCES]
    source = GENES[7]
    prompts = [prompt for prompt in of(cells, "b") if source not in dict(prompt)]
    assert 1 < len(prompts) < 8, "some cells express the source already"
    assert result.obs.loc[f"b {source}", "n_prompts"] == len(prompts)
    p, alone = (
        np.exp(next_genes(checkpoint, several, assay="10x multiome")[:, result.var_names].X.astype(float))
        for several in ([[*prompt, (source, 1.0)] for prompt in prompts], prompts)
    )
    row = result[f"b {source}"]
    expected = np.log(p.mean(0) / alone.mean(0))
    np.testing.assert_allclose(row.X[0], np.log(p.mean(0)), atol=2e-5)
    np.testing.assert_allclose(row.layers["pmi"][0], expected, atol=4e-5)
    jackknife = np.array(
        [np.log(np.delete(p, i, 0).mean(0) / np.delete(alone, i, 0).mean(0)) for i in range(len(prompts))]
    )
    n = len(prompts)
    error = np.sqrt((n - 1) / n * ((jackknife - jackknife.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(row.layers["standard_error"][0], error, rtol=0.1)


def test_a_source_that_all_cells_express_has_no_pmi() -> None:
    adata = make_adata([[1, 2, 0, 3], [2, 0, 1, 3]])
    result = pmi(load(), [GENES[3], GENES[0], GENES[1]], TARGETS, context=adata)
    assert result.obs["n_prompts"].tolist() == [0, 0, 1]
    assert np.isnan(result.layers["pmi"][:2]).all()
    assert np.isnan(result.layers["log_p_context"][:2]).all()
    assert np.isnan(np.asarray(result.X)[:2]).all()
    assert np.isfinite(result.layers["pmi"][2]).all()


def test_a_single_cell_is_a_group_of_cells(cells: anndata.AnnData) -> None:
    expressed = [GENES[j] for j in np.flatnonzero(cells.X[0])]
    source = next(gene for gene in GENES[:100] if gene not in expressed)
    single = pmi(load(), [source], expressed[:3], context=cells[:1])
    assert np.isfinite(single.layers["pmi"]).all(), "genes that a cell expresses are targets"
    assert np.isnan(single.layers["standard_error"]).all()
    assert single.obs["n_prompts"].tolist() == [1]
    groups = pmi(load(), [source], expressed[:3], context=cells[:1], groupby="group", null=10)
    assert groups.obs["context"].tolist() == ["a"]
    assert np.isfinite(groups.layers["z"]).all(), "the null is of genes that the cell does not express either"


def test_pieces_do_not_change_the_result(cells: anndata.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pmi(load(), SOURCES, TARGETS, context=cells, groupby="group", null=10)
    monkeypatch.setattr("transcriptformer.generation.pmi.MAX_VALUES", 1)
    pieces = pmi(load(), SOURCES, TARGETS, context=cells, groupby="group", null=10)
    for name in whole.layers:
        np.testing.assert_allclose(pieces.layers[name], whole.layers[name], atol=1e-3)


@pytest.mark.parametrize("in_cells", [False, True])
def test_a_null_adds_z_scores_and_p_values(in_cells: bool, cells: anndata.AnnData) -> None:
    context = cells if in_cells else [GENES[60]]
    result = pmi(load(), SOURCES, TARGETS, context=context, null=20, seed=3)
    assert {"z", "p", "q"} < set(result.layers)
    is_known = np.isfinite(result.layers["pmi"])
    for name in ("z", "p", "q"):
        np.testing.assert_array_equal(np.isfinite(result.layers[name]), is_known)
    p = result.layers["p"][is_known]
    assert (p >= 2 / 21 - 1e-6).all()
    assert (p <= 1).all()
    assert (result.layers["q"][is_known] >= p - 1e-6).all()
    again = pmi(load(), SOURCES[::-1], TARGETS, context=context, null=20, seed=3)
    np.testing.assert_allclose(again.layers["z"][::-1], result.layers["z"], atol=1e-2)


def test_a_null_larger_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="400 random sources, but only 304 genes are neither sources nor in the"):
        pmi(load(), [GENES[0]], context=[], null=400)


def test_a_context_leaves_room_for_source_and_target() -> None:
    with pytest.raises(UsageError, match="context: 125 genes; the model takes at most 124"):
        pmi(load(), [GENES[130]], context=GENES[:125])
    with pytest.raises(UsageError, match="sources: 1 gene is not in"):
        pmi(load(), ["nonsense1"])
    with pytest.raises(UsageError, match=r"sources: source ENSG00000100097=2 is given twice"):
        pmi(load(), [("LGALS1", 2), ("LGALS1", 3), ("ENSG00000100097", 2)])
    with pytest.raises(UsageError, match="sources: each prompt must be a list of genes"):
        pmi(load(), "LGALS1")
    with pytest.raises(UsageError, match="assay: cannot be combined with cells as context"):
        pmi(load(), SOURCES, context=CELLS, assay="MERFISH")
    with pytest.raises(UsageError, match=r"^groupby: applies to cells as context, which here is genes$"):
        pmi(load(), SOURCES, context=[GENES[5]], groupby="cell_type", cells_per_group=5)
    with pytest.raises(UsageError, match=r"^cells_per_group: applies to cells as context"):
        pmi(load(), SOURCES, cells_per_group=5)
    with pytest.raises(UsageError, match=r"targets: gene .* occurs twice"):
        pmi(load(), SOURCES, [GENES[0], GENES[0]])


def test_cells_are_prompts_in_the_order_of_the_data_path(cells: anndata.AnnData) -> None:
    checkpoint = load()
    cells.X[0, :] = 50
    groups = read_groups(cells, checkpoint, "group", max_genes=60)
    assert [group.name for group in groups] == ["a", "b", "c"]
    for group in groups:
        for prompt, expected in zip(group.prompts, of(cells, group.name, 60), strict=True):
            names = checkpoint.gene_vocab.names()[prompt.tokens]
            assert list(zip(names, prompt.counts, strict=True)) == expected
        assert (group.aux_tokens == 1).all()


def test_cells_longer_than_the_model_are_cut_to_what_it_predicts_behind(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint, adata = load(), random_adata(3, density=1)
    assert (np.diff(adata.X.tocsr().indptr) == 200).all()
    rows = adata.X.toarray()
    first = [[(GENES[j], min(float(row[j]), 30)) for j in range(125)] for row in rows]
    with caplog.at_level("INFO", "transcriptformer"):
        result = transcriptformer.next_genes_of_cells(checkpoint, adata)
    assert any("3 cut to their first 125 genes" in message for message in caplog.messages)
    p = np.exp(next_genes(checkpoint, first, assay="10x multiome").X.astype(float))
    np.testing.assert_allclose(result.X[0], np.log(p.mean(0)), atol=2e-5)
    source = GENES[150]
    changed = pmi(checkpoint, [source], TARGETS, context=adata)
    assert changed.obs["n_prompts"].tolist() == [3], "the source is behind the cut"
    followed = [[*prompt[:124], (source, 1.0)] for prompt in first]
    p = np.exp(next_genes(checkpoint, followed, assay="10x multiome")[:, changed.var_names].X.astype(float))
    np.testing.assert_allclose(changed.X[0], np.log(p.mean(0)), atol=2e-5)


def test_samples_are_seeded_and_without_empty_cells(cells: anndata.AnnData) -> None:
    checkpoint = load()
    cells.X[1] = 0
    cells.obs.loc["c2", "group"] = None

    def sample(n: int, seed: int) -> dict[str, list[int]]:
        groups = read_groups(cells, checkpoint, "group", n, seed)
        return {group.name: [int(prompt.tokens.sum()) for prompt in group.prompts] for group in groups}

    assert {name: len(found) for name, found in sample(9, 0).items()} == {"a": 8, "b": 7, "c": 7}
    assert {name: len(found) for name, found in sample(2, 0).items()} == {"a": 2, "b": 2, "c": 2}
    assert sample(2, 0) == sample(2, 0)
    assert any(sample(2, 0) != sample(2, seed) for seed in range(1, 5))


def test_next_genes_of_groups_are_log_means_over_cells(cells: anndata.AnnData) -> None:
    checkpoint = load()
    result = transcriptformer.next_genes_of_cells(checkpoint, cells, "group", candidates=TARGETS)
    assert result.obs["n_cells"].to_dict() == {"a": 8, "b": 8, "c": 8}
    p = np.exp(next_genes(checkpoint, of(cells, "b"), assay="10x multiome", candidates=TARGETS).X.astype(float))
    np.testing.assert_allclose(result["b"].X[0], np.log(p.mean(0)), atol=2e-5)
    error = p.std(0, ddof=1) / np.sqrt(8) / p.mean(0)
    np.testing.assert_allclose(result["b"].layers["standard_error"][0], error, rtol=1e-2)
    over_all = np.log(np.exp(result.X).mean(0))
    np.testing.assert_allclose(result.layers["pmi"], result.X - over_all, atol=1e-5)
    single = transcriptformer.next_genes_of_cells(checkpoint, cells, cells_per_group=1)
    assert single.obs_names.tolist() == ["all"]
    assert np.isnan(single.layers["standard_error"]).all()


def test_a_missing_column_is_refused() -> None:
    with pytest.raises(DataError, match="--groupby what: obs has no such column; its columns are: assay"):
        read_groups(CELLS, load(), "what")
    adata = random_adata(3)
    adata.obs["empty"] = np.nan
    with pytest.raises(DataError, match="no cell has a gene of the vocabulary and a value of 'empty'"):
        read_groups(adata, load(), "empty")


def test_prompts_and_pmi_agree() -> None:
    checkpoint = load()
    prompts = [prompt for prompt in random_prompts(20, longest=1) if prompt]
    single = next_genes(checkpoint, prompts)
    for i, prompt in enumerate(prompts):
        row = pmi(checkpoint, prompt).layers["pmi"][0]
        is_other = np.isfinite(row)
        assert is_other.sum() == len(GENES) - 1
        np.testing.assert_allclose(row[is_other], single.layers["pmi"][i][is_other], atol=2e-5)


def test_markers_of_a_cell_type_raise_each_other_on_the_demo_model() -> None:
    """Measured: AUC 0.89."""
    markers = {
        "B": ["CD79A", "CD79B", "MS4A1", "CD37", "HLA-DQA1", "HLA-DQB1"],
        "T": ["CD3D", "CD3E", "LCK", "IL32", "IL7R", "CD2", "CD7"],
        "NK": ["GNLY", "NKG7", "GZMA", "GZMB", "GZMH", "PRF1", "FGFBP2", "CST7", "CTSW"],
        "monocytes": ["LYZ", "S100A8", "S100A9", "FCN1", "CST3", "TYROBP", "LST1", "AIF1"],
    }
    genes = [gene for of_type in markers.values() for gene in of_type]
    cell_type = np.array([name for name, of_type in markers.items() for _ in of_type])
    values = np.asarray(pmi(load(DEMO), genes, genes).layers["pmi"])
    is_within, is_pair = cell_type[:, None] == cell_type, np.isfinite(values)
    within, across = values[is_within & is_pair], values[~is_within & is_pair]
    test = mannwhitneyu(within, across, alternative="greater")
    assert test.statistic / (len(within) * len(across)) > 0.8
    assert test.pvalue < 1e-20
