from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from torch.utils.data import DataLoader

from tests.golden_cases import CELLS, CHECKPOINT
from tests.h5ad_files import GENES, make_adata, random_adata
from transcriptformer.config import DataConfig
from transcriptformer.data.dataset import LENGTH_MULTIPLE, CellDataset, as_is
from transcriptformer.errors import DataError
from transcriptformer.vocab import AuxVocab, GeneVocab, read_aux_vocab

SPECIAL = ("unknown", "[PAD]", "[START]", "[END]")
VOCAB = GeneVocab(SPECIAL, {gene: i for i, gene in enumerate(GENES, start=len(SPECIAL))})
PAD = 1
ASSAY = read_aux_vocab(CHECKPOINT / "vocabs" / "assay_vocab.json", "assay", "unknown")


def make_dataset(
    *sources: Path | anndata.AnnData, seq_len: int = 127, aux_vocabs: dict[str, AuxVocab] | None = None, **config: float
) -> CellDataset:
    aux_vocabs = {"assay": ASSAY} if aux_vocabs is None else aux_vocabs
    return CellDataset(sources, VOCAB, aux_vocabs, DataConfig(**config), seq_len)  # type: ignore[arg-type]


def test_batch_holds_each_cells_genes_then_padding() -> None:
    dataset = make_dataset(make_adata([[0, 3, 0, 1], [2, 0, 0, 0]]))
    batch = dataset.__getitems__([1, 0])
    assert batch.rows.tolist() == [1, 0]
    assert batch.gene_tokens[:, :3].tolist() == [[4, PAD, PAD], [5, 7, PAD]]
    assert batch.gene_counts[:, :3].tolist() == [[2, 0, 0], [3, 1, 0]]
    assert (batch.gene_tokens[:, 3:] == PAD).all()
    assert (batch.gene_counts[:, 3:] == 0).all()
    assert batch.aux_tokens.tolist() == [[ASSAY.ids["10x multiome"]]] * 2


@pytest.mark.parametrize(
    ("n_genes", "n_positions"),
    [(0, LENGTH_MULTIPLE), (LENGTH_MULTIPLE - 1, LENGTH_MULTIPLE), (LENGTH_MULTIPLE, 2 * LENGTH_MULTIPLE), (60, 50)],
)
def test_cells_run_at_their_own_length_with_room_for_start(n_genes: int, n_positions: int) -> None:
    counts = np.zeros((1, 60))
    counts[0, :n_genes] = 1
    assert make_dataset(make_adata(counts), seq_len=50)[0].gene_tokens.shape == (1, n_positions)


def test_every_cell_comes_once_and_in_order_whatever_the_workers() -> None:
    dataset = make_dataset(random_adata(23, density=0.1))
    for n_workers in (0, 2):
        loader = DataLoader(dataset, batch_size=4, collate_fn=as_is, num_workers=n_workers)
        assert [row for batch in loader for row in batch.rows.tolist()] == list(range(23))


def test_several_sources_are_one_stream() -> None:
    parts = [random_adata(n, seed=n) for n in (3, 1, 4)]
    for i, part in enumerate(parts):
        part.obs_names = [f"file{i}-{name}" for name in part.obs_names]
    dataset = make_dataset(*parts)
    assert list(dataset.obs.index) == [name for part in parts for name in part.obs_names]
    alone = make_dataset(parts[2])
    for i in range(4):
        joined, single = dataset[4 + i], alone[i]
        np.testing.assert_array_equal(joined.gene_tokens, single.gene_tokens)
        np.testing.assert_array_equal(joined.gene_counts, single.gene_counts)


def test_metadata_of_several_sources_stays_categorical() -> None:
    parts = [random_adata(2), random_adata(2)]
    parts[0].obs["assay"] = pd.Categorical(["Drop-seq", "MERFISH"])
    parts[1].obs["assay"] = pd.Categorical(["Drop-seq", "10x multiome"])
    obs = make_dataset(*parts).obs
    assert obs["assay"].tolist() == ["Drop-seq", "MERFISH", "Drop-seq", "10x multiome"]
    assert isinstance(obs["assay"].dtype, pd.CategoricalDtype)


def test_strings_that_only_some_sources_have_become_categories_with_gaps() -> None:
    parts = [random_adata(2), random_adata(1)]
    parts[0].obs["donor"] = ["d1", "d2"]
    donor = make_dataset(*parts).obs["donor"]
    assert isinstance(donor.dtype, pd.CategoricalDtype)
    assert donor.tolist()[:2] == ["d1", "d2"]
    assert donor.isna().tolist() == [False, False, True]


def test_cells_of_one_name_stay_apart_and_are_told(caplog: pytest.LogCaptureFixture) -> None:
    dataset = make_dataset(random_adata(3), random_adata(2, seed=1))
    assert list(dataset.obs.index) == ["c0", "c1", "c2", "c0", "c1"]
    assert "2 cells bear a name that another one has" in caplog.text


def test_filters_look_at_each_source_by_itself_and_names_tell_who_stayed() -> None:
    shallow = make_adata([[1], [1], [1], [1], [9]])
    deep = make_adata([[100], [100], [100], [100], [900]])
    dataset = make_dataset(shallow, deep, filter_outliers=1.5)
    assert list(dataset.obs.index) == ["c0", "c1", "c2", "c3"] * 2
    assert dataset.statistics.n_read == 10
    assert dataset.statistics.n_kept == 8


def test_statistics_of_the_synthetic_cells() -> None:
    statistics = make_dataset(CELLS).statistics
    assert (statistics.n_read, statistics.n_kept) == (24, 24)
    obs = anndata.read_h5ad(CELLS).obs
    assert statistics.unknown_aux == {"assay": int((obs["assay"] == "a new assay").sum())}
    assert statistics.unknown_aux["assay"] > 0
    assert statistics.n_empty == 1
    assert statistics.n_too_long == 3


def test_a_missing_metadata_column_is_told_and_taken_as_unknown(caplog: pytest.LogCaptureFixture) -> None:
    adata = make_adata([[1, 2]])
    del adata.obs["assay"]
    assert make_dataset(adata)[0].aux_tokens.tolist() == [[ASSAY.unknown]]
    assert "obs has no column 'assay'" in caplog.text


def test_missing_values_of_metadata_are_unknown() -> None:
    adata = make_adata([[1], [1]])
    adata.obs["assay"] = pd.Categorical([None, "Drop-seq"])
    assert make_dataset(adata).aux_tokens.tolist() == [[ASSAY.unknown], [ASSAY.ids["Drop-seq"]]]


def test_a_checkpoint_without_metadata_columns_has_no_auxiliary_tokens() -> None:
    assert make_dataset(make_adata([[1, 2]]), aux_vocabs={})[0].aux_tokens.shape == (1, 0)


def test_no_cell_left_by_the_filters_is_an_error_that_names_them() -> None:
    with pytest.raises(DataError, match=r"no cell is left by the filters: 2 were read.*min_expressed_genes=9"):
        make_dataset(make_adata([[1, 2], [3, 4]]), min_expressed_genes=9)


def test_counts_of_the_source_are_left_as_they_are() -> None:
    adata = random_adata(5)
    before = adata.X.copy()
    make_dataset(adata, clip_counts=2, normalize_to_scale=100)[0]
    np.testing.assert_array_equal(adata.X.toarray(), before.toarray())
