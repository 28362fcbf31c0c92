import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from tests.golden_cases import CELLS, CHECKPOINT
from tests.h5ad_files import make_adata
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.errors import DataError, OutputError, UsageError
from transcriptformer.inference.run import embed, run
from transcriptformer.runs.output import new_anndata, select_columns, write_anndata

OBS = pd.DataFrame(
    {
        "zebra": pd.Categorical(["b", "a", None], categories=["c", "b", "a"], ordered=True),
        "text": ["x", "y", "z"],
        "score": np.array([0.5, np.nan, 2], dtype=np.float32),
        "n": np.array([1, 2, 3], dtype=np.int16),
        "is_doublet": [True, False, True],
        "maybe_n": pd.array([1, None, 3], dtype="Int64"),
        "maybe_text": pd.array(["x", None, "z"], dtype="string"),
        "assay": "Drop-seq",
    },
    index=pd.Index(["AAAC-1", "AAAG-1", "AAAT-1"], name="barcode"),
)


def run_on(path: Path, output: Path, **inference: object) -> anndata.AnnData:
    options = {f"model.inference_config.{key}": value for key, value in inference.items()}
    config = load_config(CHECKPOINT, {**options, "model.inference_config.output_path": str(output)})
    written = run([path], CHECKPOINT, config)
    assert written is not None
    return anndata.read_zarr(written) if written.suffix == ".zarr" else anndata.read_h5ad(written)


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    adata = make_adata([[1, 2, 0], [0, 1, 1], [3, 0, 0]])
    adata.obs = OBS.copy()
    path = tmp_path / "cells.h5ad"
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(path, convert_strings_to_categoricals=False)
    return path


def test_obs_is_preserved_exactly(cells: Path, tmp_path: Path) -> None:
    result = run_on(cells, tmp_path / "out")
    pd.testing.assert_frame_equal(result.obs, anndata.read_h5ad(cells).obs)
    assert result.obs.index.name == "barcode"
    assert list(result.obs.columns) == list(OBS.columns)
    assert result.obs["text"].dtype == object


def test_obs_of_real_columns_survives(tmp_path: Path) -> None:
    pd.testing.assert_frame_equal(run_on(CELLS, tmp_path).obs, anndata.read_h5ad(CELLS).obs)


def test_selected_columns_keep_the_order_of_the_file(cells: Path, tmp_path: Path) -> None:
    assert list(run_on(cells, tmp_path / "out", obs_keys=["n", "zebra"]).obs.columns) == ["zebra", "n"]
    assert list(run_on(cells, tmp_path / "out", obs_keys=[]).obs.columns) == []


def test_a_missing_column_is_named_with_the_available_ones() -> None:
    with pytest.raises(DataError, match=r"no column 'cell_type'; its columns are: zebra, text"):
        select_columns(list(OBS.columns), ["zebra", "cell_type"])


def test_results_are_under_the_documented_keys(tmp_path: Path) -> None:
    result = run_on(CELLS, tmp_path, output_keys=["embeddings", "llh"])
    assert result.obsm["embeddings"].shape == (24, 32)
    assert result.obsm["embeddings"].dtype == np.float32
    assert list(result.uns["llh"].columns) == ["llh"]
    assert list(result.uns["llh"].index) == list(result.obs_names)


def test_only_requested_results_are_written(tmp_path: Path) -> None:
    assert "llh" not in run_on(CELLS, tmp_path).uns
    assert "embeddings" not in run_on(CELLS, tmp_path, output_keys=["llh"]).obsm


def test_the_file_has_its_provenance(tmp_path: Path) -> None:
    made = run_on(CELLS, tmp_path, batch_size=3).uns["transcriptformer"]
    assert made["checkpoint"] == "checkpoint"
    assert len(made["weights_sha256"]) == 64
    assert list(made["data_files"]) == [str(CELLS)]
    assert json.loads(made["config"])["model"]["inference_config"]["batch_size"] == 3
    assert made["version"]


def test_the_old_result_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "embeddings.h5ad"
    output.write_bytes(b"the old result")
    broken = make_adata([[1]])
    broken.uns["unwritable"] = object()
    with pytest.raises(Exception, match="unwritable"):
        write_anndata(broken, output)
    assert output.read_bytes() == b"the old result"
    assert list(tmp_path.iterdir()) == [output]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_anndata(make_adata([[1]]), tmp_path / "gone" / "embeddings.h5ad")


def test_results_in_memory_keep_metadata_that_a_file_could_not_store() -> None:
    adata = make_adata([[1], [2]])
    adata.obs["mixed"] = [1, "x"]
    result = embed(adata, load_checkpoint(CHECKPOINT, load_config(CHECKPOINT)))
    pd.testing.assert_frame_equal(result.obs, adata.obs)


def test_an_index_may_have_the_name_of_a_result(tmp_path: Path) -> None:
    adata = make_adata([[1], [2]])
    adata.obs.index.name = "llh"
    adata.write_h5ad(tmp_path / "cells.h5ad")
    result = run_on(tmp_path / "cells.h5ad", tmp_path, output_keys=["llh"])
    assert result.obs.index.name == "llh"
    assert list(result.uns["llh"].index) == ["c0", "c1"]


def test_a_single_source_needs_no_list_and_an_empty_list_is_an_error() -> None:
    config = load_config(CHECKPOINT)
    checkpoint = load_checkpoint(CHECKPOINT, config)
    for sources in (CELLS, str(CELLS), [str(CELLS)], anndata.read_h5ad(CELLS)):
        assert embed(sources, checkpoint).n_obs == 24
    with pytest.raises(UsageError, match="no input"):
        embed([], checkpoint)


def test_progress_reports_completed_cells() -> None:
    config = load_config(CHECKPOINT, {"model.inference_config.batch_size": 10})
    calls: list[tuple[int, int]] = []
    embed(CELLS, load_checkpoint(CHECKPOINT, config), lambda *progress: calls.append(progress))
    assert calls == [(0, 24), (10, 24), (20, 24), (24, 24)]


def test_cells_from_memory_and_from_a_file_give_the_same_result(tmp_path: Path) -> None:
    config = load_config(CHECKPOINT)
    in_memory = embed([anndata.read_h5ad(CELLS)], load_checkpoint(CHECKPOINT, config))
    np.testing.assert_array_equal(in_memory.obsm["embeddings"], run_on(CELLS, tmp_path).obsm["embeddings"])
    assert list(in_memory.uns["transcriptformer"]["data_files"]) == ["AnnData"]


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_obs_is_the_same_written_in_blocks(
    cells: Path, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transcriptformer.runs.inputs.BLOCK_SIZE", 2)
    monkeypatch.setattr("transcriptformer.inference.embeddings.BLOCK_BYTES", 300)
    result = run_on(cells, tmp_path / "out", output_filename=f"embeddings.{ending}", output_keys=["embeddings", "llh"])
    pd.testing.assert_frame_equal(result.obs, anndata.read_h5ad(cells).obs, check_dtype=ending == "h5ad")
    expected = run_on(cells, tmp_path / "whole", output_keys=["embeddings", "llh"])
    np.testing.assert_array_equal(result.obsm["embeddings"], expected.obsm["embeddings"])
    np.testing.assert_array_equal(result.uns["llh"], expected.uns["llh"])


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_gene_embeddings_are_the_same_written_in_blocks(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_on(CELLS, tmp_path / "whole", emb_type="cge").uns
    monkeypatch.setattr("transcriptformer.inference.embeddings.BLOCK_BYTES", 10_000)
    result = run_on(CELLS, tmp_path / "out", emb_type="cge", output_filename=f"embeddings.{ending}").uns
    for key in ("cge_embeddings", "cge_cell_indices", "cge_gene_names"):
        np.testing.assert_array_equal(result[key], expected[key])


@pytest.mark.parametrize("n_empty", [1, 2, 5])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_cells_without_genes_may_follow_one_larger_than_a_block(
    n_empty: int, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transcriptformer.inference.embeddings.BLOCK_BYTES", 128)  # one gene of width 32
    full, empty = [[1, 2, 3, 4, 5]] * 2, [[0] * 5] * n_empty
    counts = {"first": [*empty, *full], "middle": [full[0], *empty, full[1]], "last": [*full, *empty]}[place]
    make_adata(counts).write_h5ad(tmp_path / "cells.h5ad")
    uns = run_on(tmp_path / "cells.h5ad", tmp_path / "out", emb_type="cge").uns
    assert uns["cge_cell_indices"].tolist() == [row for row, of_cell in enumerate(counts) for n in of_cell if n]
    assert uns["cge_embeddings"].shape == (10, 32)


def test_cells_without_any_gene_have_no_gene_embeddings(tmp_path: Path) -> None:
    make_adata([[0, 0], [0, 0], [0, 0]]).write_h5ad(tmp_path / "empty.h5ad")
    make_adata([[0, 0], [1, 2], [0, 0]]).write_h5ad(tmp_path / "one.h5ad")
    assert run_on(tmp_path / "empty.h5ad", tmp_path / "out", emb_type="cge").uns["cge_embeddings"].shape == (0, 32)
    assert run_on(tmp_path / "one.h5ad", tmp_path / "out", emb_type="cge").uns["cge_cell_indices"].tolist() == [1, 1]


def test_a_complete_zarr_store_replaces_the_old_one(tmp_path: Path) -> None:
    for seed in (1, 2):
        (tmp_path / f"{seed}.h5ad").unlink(missing_ok=True)
        make_adata([[seed, seed]]).write_h5ad(tmp_path / f"{seed}.h5ad")
        result = run_on(tmp_path / f"{seed}.h5ad", tmp_path / "out", output_filename="embeddings.zarr")
    assert list(result.uns["transcriptformer"]["data_files"]) == [str(tmp_path / "2.h5ad")]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["embeddings.zarr"]


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".embeddings.h5ad.tmp").write_bytes(b"half")
    write_anndata(make_adata([[1]]), tmp_path / "embeddings.h5ad")
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings.h5ad"]


def test_inputs_are_closed_when_the_run_is_done(tmp_path: Path) -> None:
    adata = make_adata([[1], [2]])
    adata.write_h5ad(tmp_path / "cells.h5ad")
    config = load_config(CHECKPOINT)
    embed(tmp_path / "cells.h5ad", load_checkpoint(CHECKPOINT, config))
    run_on(tmp_path / "cells.h5ad", tmp_path / "out")
    adata.write_h5ad(tmp_path / "cells.h5ad")


def test_a_failure_leaves_no_incomplete_output(tmp_path: Path) -> None:
    for name in ("embeddings.zarr", "embeddings.h5ad"):
        with pytest.raises(ZeroDivisionError), new_anndata(tmp_path / name):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
