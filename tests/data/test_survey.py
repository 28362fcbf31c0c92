from pathlib import Path

import anndata
import numpy as np
import pytest

from tests.data.test_batches import make_readers
from tests.golden_cases import CELLS
from tests.h5ad_files import GENES, make_adata, random_adata
from transcriptformer.config import DataConfig
from transcriptformer.data.survey import Survey, survey_cells
from transcriptformer.errors import DataError


def survey(*sources: Path | anndata.AnnData, seq_len: int = 127, **config: float) -> Survey:
    readers = make_readers(*sources, seq_len=seq_len, **config)  # type: ignore[arg-type]
    return survey_cells(readers, readers[0].config)


def test_statistics_of_the_synthetic_cells() -> None:
    found = survey(CELLS)
    assert (found.n_read, found.n_kept) == (24, 24)
    obs = anndata.read_h5ad(CELLS).obs
    n_unknown = int((obs["assay"] == "a new assay").sum())
    assert found.unknown_aux.sum(axis=0).tolist() == [n_unknown]
    assert n_unknown > 0
    assert found.n_empty == 1
    assert found.n_too_long(127) == 3


def test_counts_beyond_the_sequence_length_are_unseen() -> None:
    found = survey(make_adata([[1, 2, 3, 4], [0, 0, 0, 10]]), seq_len=3)
    assert found.unseen.tolist() == [4, 0]
    assert found.unseen_share == pytest.approx(0.2)
    found = survey(make_adata([[1, 2, 3, 4]]), seq_len=3, sort_genes=True)
    assert found.unseen.tolist() == [1]


@pytest.mark.parametrize("block_size", [1, 4, 100])
def test_results_do_not_depend_on_the_block_size(block_size: int) -> None:
    at_once, in_blocks = (
        survey(random_adata(17), random_adata(5, seed=1), block_size=size, filter_outliers=1)
        for size in (50, block_size)
    )
    np.testing.assert_array_equal(at_once.kept, in_blocks.kept)
    np.testing.assert_array_equal(at_once.lengths, in_blocks.lengths)
    assert 0 < at_once.n_kept < 22


def test_saving_and_loading_a_survey(tmp_path: Path) -> None:
    found = survey(CELLS)
    found.save(tmp_path / "survey.safetensors")
    loaded = Survey.load(tmp_path / "survey.safetensors")
    for name in ("kept", "lengths", "unknown_aux", "totals", "unseen", "n_fractional", "n_repeated_names"):
        np.testing.assert_array_equal(getattr(found, name), getattr(loaded, name))


def test_non_integer_counts_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert survey(make_adata([[1, 250.7]]), make_adata([[1, 2]])).n_fractional == 1
    assert "counts are not integers" in caplog.text
    caplog.clear()
    assert survey(make_adata([[1, 2]])).n_fractional == 0
    assert caplog.text == ""


def test_repeated_cell_names_are_counted() -> None:
    assert survey(random_adata(3), random_adata(2, seed=1)).n_repeated_names == 2


def test_genes_of_two_species_are_a_warning_with_their_counts(caplog: pytest.LogCaptureFixture) -> None:
    mouse = [f"mm10___ENSMUSG{i:011d}" for i in range(2)]
    survey(make_adata([[1, 2, 3], [4, 0, 6], [0, 0, 4]], [GENES[0], *mouse]), block_size=2)
    found = "homo_sapiens (1 genes, 5 counts, 25.0 %), mus_musculus (2 genes, 15 counts, 75.0 %)"
    assert f"genes of several species: {found}; embed" in caplog.text


def test_a_few_genes_of_another_species_are_not(caplog: pytest.LogCaptureFixture) -> None:
    survey(make_adata(np.ones((2, 200)), [*GENES[:199], "ENSMUSG00000000001"]))
    assert "species" not in caplog.text


def test_filters_that_remove_all_cells_are_an_error() -> None:
    with pytest.raises(DataError, match=r"the filters removed all 2 cells; .*min_expressed_genes=9"):
        survey(make_adata([[1, 2], [3, 4]]), min_expressed_genes=9)


def test_progress_is_reported_in_cells() -> None:
    reported: list[tuple[int, int]] = []
    readers = make_readers(random_adata(5), random_adata(2))
    survey_cells(readers, DataConfig(block_size=3), lambda *progress: reported.append(progress))
    assert reported == [(3, 7), (5, 7), (7, 7)]
