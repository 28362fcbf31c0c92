"""Pooled gene embeddings equal means of the full result, regardless of batches and interruptions."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_cases import CELLS, CHECKPOINT, relative_error
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.checkpoint.vocabs import read_gene_ids
from transcriptformer.config import Config
from transcriptformer.inference.run import embed, run
from transcriptformer.runs.pooling import NO_GROUP, Pool, PoolWriter, read_pools, verified_rows
from transcriptformer.storage.atomic import temporary_path

TOLERANCE = 1e-6


def config_for(cge_pool: str | None, **inference: object) -> Config:
    fixed = {"precision": "32", "device": "cpu", "emb_type": "cge", "cge_pool": cge_pool}
    return load_config(CHECKPOINT, {f"model.inference_config.{k}": v for k, v in {**fixed, **inference}.items()})


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    adata = anndata.read_h5ad(CELLS)
    adata.obs["state"] = pd.Categorical(["late", None, "early"] * 8, categories=["unused", "late", "early"])
    adata.obs["batch"] = np.where(np.arange(24) % 5, 1.5, np.nan)
    return adata


@pytest.fixture(scope="module")
def per_gene(cells: anndata.AnnData) -> pd.DataFrame:
    """The full result: one row per gene and cell."""
    result = embed(cells, load_checkpoint(CHECKPOINT, config_for(None)))
    table = pd.DataFrame(result.uns["cge_embeddings"].astype(np.float64))
    cell = result.uns["cge_cell_indices"]
    columns = {name: cells.obs[name].to_numpy()[cell] for name in ("state", "batch")}
    return table.assign(gene=result.uns["cge_gene_names"], **columns)


@pytest.mark.parametrize("column", ["gene", "state", "batch"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_pool_is_the_mean_of_the_full_result(
    column: str, batch_size: int, cells: anndata.AnnData, per_gene: pd.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    pooled = embed(cells, load_checkpoint(CHECKPOINT, config_for(column, batch_size=batch_size)))
    keys = list(dict.fromkeys(["gene", column]))
    groups = per_gene.dropna(subset=keys).groupby(keys)
    rows = [tuple(row) for row in pooled.obs[keys].astype(object).to_numpy()]
    assert sorted(rows) == sorted(key if isinstance(key, tuple) else (key,) for key, _ in groups)
    of_row = [row if len(row) > 1 else row[0] for row in rows]
    expected = groups[list(range(32))].mean().loc[of_row].to_numpy()
    assert pooled.obsm["embeddings"].dtype == np.float32
    assert relative_error(pooled.obsm["embeddings"], expected) < TOLERANCE
    assert pooled.obs["n_cells"].tolist() == groups.size().loc[of_row].tolist()
    assert pooled.obs_names.is_unique
    n_without = 0 if column == "gene" else int(cells.obs[column].isna().sum())
    assert (f"{n_without} cells without a value of '{column}' are in no group" in caplog.text) == (n_without > 0)


def test_rows_are_in_vocabulary_order_with_the_groups_of_a_gene_together(cells: anndata.AnnData) -> None:
    pooled = embed(cells, load_checkpoint(CHECKPOINT, config_for("state")))
    order = {gene: i for i, gene in enumerate(read_gene_ids(CHECKPOINT / "vocabs" / "homo_sapiens_gene.h5"))}
    indices = [order[gene] for gene in pooled.obs["gene"]]
    assert indices == sorted(indices)
    gene, state = pooled.obs["gene"].iloc[0], pooled.obs["state"].iloc[0]
    assert pooled.obs_names[0] == f"{gene} | {state}"


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_pools_in_files_and_in_memory_are_equal(
    ending: str, cells: anndata.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transcriptformer.runs.pooling.FLUSH_SECONDS", 0)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    config = config_for("state", output_path=str(tmp_path), output_filename=f"pool.{ending}")
    written = run([tmp_path / "cells.h5ad"], CHECKPOINT, config)
    assert written is not None
    pooled = anndata.read_zarr(written) if ending == "zarr" else anndata.read_h5ad(written)
    expected = embed(cells, load_checkpoint(CHECKPOINT, config))
    assert list(pooled.obs_names) == list(expected.obs_names)
    assert pooled.obs.astype(str).equals(expected.obs.astype(str))
    np.testing.assert_allclose(pooled.obsm["embeddings"], expected.obsm["embeddings"], rtol=0, atol=1e-7)


N_TOKENS, WIDTH = 11, 3


def batch(rows: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Genes and vectors that depend only on the row."""
    genes, vectors = [], []
    for row in rows:
        rng = np.random.default_rng([seed, row])
        genes.append(rng.permutation(N_TOKENS)[: rng.integers(0, N_TOKENS + 1)])
        vectors.append(rng.standard_normal((len(genes[-1]), WIDTH)).astype(np.float32))
    lengths = np.array([len(of_cell) for of_cell in genes])
    vector = np.concatenate(vectors)
    return {"rows": np.array(rows), "n_genes": lengths, "genes": np.concatenate(genes), "cge_embeddings": vector}


def table_of(pool: Pool) -> tuple[pd.DataFrame, np.ndarray]:
    names = np.array([f"gene{i}" for i in range(N_TOKENS)], dtype=object)
    return pool.table(names, pd.Index(["A", "B", "C"]), "group")


@settings(max_examples=50)
@given(data=st.data(), groups=st.lists(st.integers(NO_GROUP, 2), min_size=1, max_size=15))
def test_order_and_size_of_batches_do_not_matter(data: st.DataObject, groups: list[int]) -> None:
    rows: list[int] = data.draw(st.permutations(range(len(groups))))
    step = data.draw(st.integers(1, len(rows)))
    pools = []
    for batches in ([list(range(len(rows)))], [rows[i : i + step] for i in range(0, len(rows), step)]):
        pools.append(Pool(np.array(groups, np.int32), N_TOKENS, WIDTH, "cge_embeddings"))
        for batch_rows in batches:
            pools[-1].add(batch(batch_rows))
    (table, means), (other_table, other_means) = map(table_of, pools)
    pd.testing.assert_frame_equal(table, other_table)
    np.testing.assert_allclose(means, other_means, rtol=0, atol=1e-6)
    assert not np.isnan(means).any()


def test_saved_pools_of_all_attempts_and_processes_add_up(tmp_path: Path) -> None:
    groups = np.array([0, 1, NO_GROUP, 2, 0, 1, 2, 2], np.int32)

    def new_pool() -> Pool:
        return Pool(groups, N_TOKENS, WIDTH, "cge_embeddings")

    first = PoolWriter(tmp_path, 0, new_pool(), "run")
    first.add(batch([0, 2]))
    first.flush()
    first.add(batch([1]))  # lost: the process is killed before it saves
    assert verified_rows(tmp_path, "run", 8).nonzero()[0].tolist() == [0, 2]
    temporary_path(first.path).write_bytes(b"half a file")  # killed while saving
    before = first.path.read_bytes()
    for process, rows in ((0, [1, 7]), (1, [3, 4]), (0, [5, 6])):
        again = PoolWriter(tmp_path, process, new_pool(), "run")
        for row in rows:
            again.add(batch([row]))
            again.flush()
    assert verified_rows(tmp_path, "run", 8).all()
    assert first.path.read_bytes() == before
    whole, saved = new_pool(), new_pool()
    whole.add(batch(list(range(8))))
    read_pools(tmp_path, "run", saved)
    (table, means), (saved_table, saved_means) = table_of(whole), table_of(saved)
    pd.testing.assert_frame_equal(table, saved_table)
    np.testing.assert_allclose(means, saved_means, rtol=0, atol=1e-6)


@pytest.mark.parametrize("can_be_deleted", [True, False])
def test_cells_in_two_saved_pools_count_once(
    can_be_deleted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = np.zeros(6, np.int32)
    for rows in ([0, 1], [1, 2], [3]):
        writer = PoolWriter(tmp_path, len(rows), Pool(groups, N_TOKENS, WIDTH, "cge_embeddings"), "run")
        writer.add(batch(rows))
        writer.flush()

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError

    if not can_be_deleted:
        monkeypatch.setattr(Path, "unlink", refuse)
    saved, expected = Pool(groups, N_TOKENS, WIDTH, "cge_embeddings"), Pool(groups, N_TOKENS, WIDTH, "cge_embeddings")
    done = read_pools(tmp_path, "run", saved)
    assert "contains cells that another file contains too" in caplog.text
    assert done.nonzero()[0].tolist() in ([0, 1, 3], [1, 2, 3])
    expected.add(batch(done.nonzero()[0].tolist()))
    np.testing.assert_allclose(table_of(saved)[1], table_of(expected)[1], rtol=0, atol=1e-6)


def test_a_pool_that_failed_to_add_a_batch_is_not_saved(tmp_path: Path) -> None:
    writer = PoolWriter(tmp_path, 0, Pool(np.zeros(6, np.int32), N_TOKENS, WIDTH, "cge_embeddings"), "run")
    writer.add(batch([0]))
    writer.flush()
    with pytest.raises(ValueError, match="broadcast"):
        writer.add({**batch([1]), "cge_embeddings": np.zeros((len(batch([1])["genes"]), WIDTH + 1), np.float32)})
    with pytest.raises(ValueError, match="broadcast"):
        writer.flush()
    assert verified_rows(tmp_path, "run", 6).nonzero()[0].tolist() == [0]


def test_a_pool_that_failed_to_save_accepts_no_more_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = PoolWriter(tmp_path, 0, Pool(np.zeros(6, np.int32), N_TOKENS, WIDTH, "cge_embeddings"), "run")
    writer.add(batch([0]))
    writer.flush()
    writer.add(batch([1]))

    def raise_memory_error(*arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("transcriptformer.runs.pooling.write_sealed", raise_memory_error)
        with pytest.raises(MemoryError):
            writer.flush()
    with pytest.raises(MemoryError):
        writer.add(batch([2]))
    with pytest.raises(MemoryError):
        writer.flush()
    assert verified_rows(tmp_path, "run", 6).nonzero()[0].tolist() == [0]
