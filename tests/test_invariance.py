"""A cell's embedding depends only on the cell."""

from collections.abc import Callable
from functools import cache
from typing import Any

import anndata
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from tests.golden_cases import CELLS, CHECKPOINT, TOLERANCE, relative_error
from tests.h5ad_files import random_adata
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.config import Config
from transcriptformer.inference.run import embed

FORMATS: dict[str, Callable[[Any], Any]] = {
    "CSR": sparse.csr_matrix,
    "CSC": sparse.csc_matrix,
    "CSR array": sparse.csr_array,
    "dense": lambda matrix: matrix.toarray(),
}
CELLS_OF_EVERY_LENGTH = random_adata(12, n_genes=200, density=0.5)
for i in range(12):  # from no genes to more than the model has positions
    CELLS_OF_EVERY_LENGTH.X[i] = CELLS_OF_EVERY_LENGTH.X[i].multiply(np.arange(200) < 17 * i)


@cache
def config_for(batch_size: int, precision: str = "32") -> Config:
    return load_config(
        CHECKPOINT,
        {
            "model.inference_config.batch_size": batch_size,
            "model.inference_config.precision": precision,
            "model.inference_config.device": "cpu",
            "model.inference_config.output_keys": ["embeddings", "llh"],
        },
    )


def results(source: Any, batch_size: int = 5, precision: str = "32") -> anndata.AnnData:
    config = config_for(batch_size, precision)
    return embed([source], load_checkpoint(CHECKPOINT, config))


@cache
def reference(precision: str = "32") -> anndata.AnnData:
    """Results with a batch size of 1."""
    return results(CELLS_OF_EVERY_LENGTH, batch_size=1, precision=precision)


@settings(max_examples=25)
@given(
    order=st.lists(st.integers(0, 11), min_size=1, max_size=14),
    batch_size=st.integers(1, 15),
    matrix_format=st.sampled_from(list(FORMATS)),
)
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_embedding_does_not_depend_on_batch_neighbours_order_or_matrix_format(
    order: list[int], batch_size: int, matrix_format: str
) -> None:
    cells = CELLS_OF_EVERY_LENGTH[order].copy()
    cells.X = FORMATS[matrix_format](cells.X)
    result = results(cells, batch_size)
    assert list(result.obs_names) == list(cells.obs_names)
    expected = reference().obsm["embeddings"][order]
    assert relative_error(result.obsm["embeddings"], expected) < TOLERANCE
    llh = reference().uns["llh"]["llh"].to_numpy()[order]
    if not np.isnan(llh).all():
        assert relative_error(result.uns["llh"]["llh"].to_numpy(), llh) < TOLERANCE


def test_worker_processes_change_nothing() -> None:
    config = load_config(CHECKPOINT, {"model.data_config.n_data_workers": 2, "model.inference_config.precision": "32"})
    result = embed([CELLS_OF_EVERY_LENGTH], load_checkpoint(CHECKPOINT, config))
    assert relative_error(result.obsm["embeddings"], reference().obsm["embeddings"]) < TOLERANCE


def test_bfloat16_is_close_to_float32() -> None:
    exact, rounded = (results(CELLS, precision=precision).obsm["embeddings"] for precision in ("32", "bf16-mixed"))
    assert 0 < relative_error(rounded, exact) < 2e-2


@given(order=st.permutations(range(12)), batch_size=st.integers(2, 12))
@settings(max_examples=8)
def test_in_16_mixed_a_cell_does_not_depend_on_its_neighbours(order: list[int], batch_size: int) -> None:
    expected = reference("16-mixed").obsm["embeddings"]
    together = results(CELLS_OF_EVERY_LENGTH[order].copy(), batch_size, precision="16-mixed").obsm["embeddings"]
    for row, cell in enumerate(order):
        assert relative_error(together[row], expected[cell]) < 1e-3


def test_a_cell_without_genes_has_an_embedding_but_no_llh() -> None:
    result = reference()
    assert np.isfinite(result.obsm["embeddings"][0]).all()
    assert np.isnan(result.uns["llh"]["llh"].iloc[0])
    assert result.uns["llh"]["llh"].iloc[1:].notna().all()
