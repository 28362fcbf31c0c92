"""New cells as AnnData: from nothing, from genes, like other cells, and from parts of cells."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch

from tests.generation.checkpoints import load, some_cells, without_gene_head
from tests.golden_cases import CELLS, SYNTHETIC
from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.errors import CheckpointError, TranscriptFormerError, UsageError
from transcriptformer.generation.generate import generate
from transcriptformer.model.transcriptformer import TranscriptFormer

MAX_GENES = 126


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return load()


def genes_of(cells: anndata.AnnData, row: int) -> np.ndarray:
    """Tokens of a cell's genes, in order."""
    order = cells.layers["order"][row]
    return order.indices[np.argsort(order.data)] + 7


def test_cells_from_genes(model: Checkpoint) -> None:
    names = list(model.gene_vocab.genes)
    cells = generate(model, 3, prompt=[names[5], (names[2], 4)], n_genes=40, total_counts=90, assay="10x 3' v3")
    assert cells.shape == (3, len(names))
    assert list(cells.var_names) == names
    counts = cells.X.toarray()
    assert counts.dtype == np.float32
    assert ((counts > 0).sum(1) == 40).all()
    assert (counts == np.rint(counts)).all()
    assert (counts[:, 5] == 1).all()
    assert (counts[:, 2] == 4).all()
    for row in range(3):
        assert list(genes_of(cells, row)[:2]) == [5 + 7, 2 + 7]
    assert list(cells.obs["prompt"]) == [f"{names[5]}=1 {names[2]}=4"] * 3
    assert list(cells.obs["n_prompt_genes"]) == [2] * 3
    assert list(cells.obs["n_genes"]) == [40] * 3
    assert list(cells.obs["assay"]) == ["10x 3' v3"] * 3
    assert cells.uns["transcriptformer"]["checkpoint"] == "checkpoint"
    assert cells.uns["generation"]["renormalized_over"] == "genes of the vocabulary that the cell lacks"


@pytest.mark.parametrize("rounds", [0, 1])
def test_the_likelihood_is_that_of_the_cell(rounds: int, model: Checkpoint) -> None:
    cells = generate(model, 2, n_genes=30, total_counts=80, count_rounds=rounds)
    network, pad = model.model, model.gene_vocab.pad
    assert isinstance(network, TranscriptFormer)
    for row in range(2):
        genes = torch.from_numpy(np.append(genes_of(cells, row), pad).astype(np.int64))[None]
        counts = torch.zeros(genes.shape)
        counts[0, :-1] = torch.from_numpy(cells.X.toarray()[row, genes[0, :-1].numpy() - 7])
        encoded = network(genes, counts, torch.tensor([[model.aux_vocabs["assay"].unknown]]))
        expected = -30 * float(network.gene_nll(encoded))
        assert cells.obs["log_likelihood"].iloc[row] == pytest.approx(expected, rel=1e-5)


def test_cells_like_others(model: Checkpoint) -> None:
    real = anndata.read_h5ad(CELLS)
    every = generate(model, like=real, seed=3)
    known = real[:, real.var["ensembl_id"].astype(str).str.split(".").str[0].isin(model.gene_vocab.genes)]
    n_genes = (known.X > 0).sum(1)
    n_genes = np.asarray(n_genes).ravel()
    assert list(every.obs["n_genes"]) == list(np.minimum(n_genes[n_genes > 0], MAX_GENES))
    some = generate(model, 50, like=str(CELLS), seed=3)
    pairs = set(zip(every.obs["n_genes"], every.obs["total_counts_wanted"], every.obs["assay"], strict=True))
    drawn = list(zip(some.obs["n_genes"], some.obs["total_counts_wanted"], some.obs["assay"], strict=True))
    assert set(drawn) <= pairs
    assert len(set(drawn)) > 10


def test_cells_longer_than_the_model(model: Checkpoint) -> None:
    cells = some_cells(model, [200, 300])
    assert list(generate(model, like=cells).obs["n_genes"]) == [MAX_GENES] * 2
    parts = generate(model, data=cells, keep=0.9)
    assert list(parts.obs["n_genes"]) == [MAX_GENES] * 2
    assert list(parts.obs["n_prompt_genes"]) == [round(0.9 * MAX_GENES)] * 2
    with pytest.raises(UsageError, match=r"data \(--data-file\), cell 0: 126 genes; there are only 64 candidates"):
        generate(model, data=cells, candidates=list(model.gene_vocab.genes)[:1])


def test_models_with_another_link_need_no_total() -> None:
    model = load(**{"model.model_config.mu_link_fn": "exp"})
    cells = generate(model, 2, n_genes=5)
    assert (np.diff(cells.X.indptr) == 5).all()
    assert cells.obs["total_counts_wanted"].isna().all()
    assert (generate(model, 2, n_genes=5, total_counts=1).X != cells.X).nnz == 0


def test_a_part_of_each_cell_is_kept(model: Checkpoint) -> None:
    real = anndata.read_h5ad(CELLS)
    cells = generate(model, data=real, keep=0.25, seed=1)
    assert list(cells.obs_names) == list(real.obs_names)
    ids = real.var["ensembl_id"].astype(str).str.split(".").str[0].to_numpy()
    counts, n_given = np.asarray(real.X.toarray()), cells.obs["n_prompt_genes"].to_numpy()
    assert (n_given == np.round(0.25 * cells.obs["n_genes"])).all()
    column_of = {gene: i for i, gene in reversed(list(enumerate(ids)))}
    for row in range(len(cells)):
        for token in genes_of(cells, row)[: n_given[row]]:
            gene = cells.var_names[token - 7]
            expected = min(counts[row, column_of[gene]], model.config.model.data_config.clip_counts)
            assert cells.X[row, token - 7] == expected
    other = generate(model, data=real, keep=0.25, seed=2)
    assert set(genes_of(other, 0)[: n_given[0]]) != set(genes_of(cells, 0)[: n_given[0]])


def test_candidates_are_a_list_or_a_species(model: Checkpoint) -> None:
    names = list(model.gene_vocab.genes)
    cells = generate(model, 4, n_genes=10, total_counts=20, candidates=names[100:110])
    assert (cells.X.toarray()[:, 100:110] > 0).all()
    assert list(cells.uns["generation"]["candidates"]) == names[100:110]
    assert generate(model, 1, n_genes=5, total_counts=9, candidates="Homo sapiens").obs["n_genes"].iloc[0] == 5


def test_batches_do_not_matter(model: Checkpoint) -> None:
    together = generate(model, like=str(CELLS), seed=4)
    apart = generate(load(block_size=3, **{"model.inference_config.batch_size": 3}), like=str(CELLS), seed=4)
    assert (together.X != apart.X).nnz == 0
    assert (together.layers["order"] != apart.layers["order"]).nnz == 0


def test_progress_ends_with_all_genes(model: Checkpoint) -> None:
    seen: list[tuple[int, int]] = []
    generate(model, 3, n_genes=4, total_counts=9, on_progress=lambda *counts: seen.append(counts))
    assert seen[0] == (0, 12)
    assert seen[-1] == (12, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "n_cells (--n-cells), n_genes (--n-genes), total_counts (--total-counts): missing"),
        ({"n_cells": 1, "n_genes": 5}, "total_counts (--total-counts): missing"),
        ({"n_cells": 0, "n_genes": 5, "total_counts": 9}, "n_cells (--n-cells): must be at least 1"),
        (
            {"n_cells": 1, "n_genes": 128, "total_counts": 999},
            "n_genes (--n-genes): 128 genes; the model takes at most 126",
        ),
        ({"n_cells": 1, "n_genes": 127, "total_counts": 999}, "the model takes at most 126"),
        (
            {"n_cells": 1, "n_genes": 5, "total_counts": 3},
            "total_counts (--total-counts): 5 genes; the total count is 3",
        ),
        ({"n_cells": 1, "n_genes": 5, "total_counts": 9, "keep": 0.3}, "keep (--keep): applies to the cells of data"),
        ({"like": "nowhere.h5ad"}, "--like nowhere.h5ad"),
        ({"n_cells": 1, "n_genes": 5, "total_counts": float("nan")}, "must be at least 1, not nan"),
        ({"n_cells": 1, "n_genes": 1, "total_counts": 9, "prompt": ["ENSG00000100291", "ENSG00000100196"]}, "already"),
        ({"n_cells": 1, "n_genes": 3, "total_counts": 9, "candidates": ["ENSG00000100291"]}, "only 1 candidates"),
        ({"n_cells": 1, "n_genes": 3, "total_counts": 9, "candidates": "martian"}, "'martian' is neither a file nor"),
        ({"n_cells": 1, "n_genes": 3, "total_counts": 9, "prompt": ["NOPE"]}, "not in the checkpoint's vocabulary"),
        ({"n_cells": 1, "n_genes": 3, "total_counts": 9, "keep": 1.0}, "keep (--keep): must be between 0 and 1"),
        ({"n_cells": 1, "n_genes": 3, "total_counts": 9, "temperature": 0}, "temperature (--temperature)"),
        ({"data": CELLS, "prompt": ["ENSG00000100291"]}, "data (--data-file): gives one new cell per cell"),
        ({"data": "nowhere.h5ad"}, "nowhere.h5ad"),
        ({"data": CELLS, "metadata": {"tissue": "lung"}}, "tissue: the checkpoint was not trained with this metadata"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], message: str, model: Checkpoint) -> None:
    with pytest.raises(UsageError) as error:
        generate(model, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("head", ["gene_id_head", "mu.mlp"])
def test_predictions_that_overflow_are_refused(head: str) -> None:
    model = load()
    assert isinstance(model.model, TranscriptFormer)
    with torch.no_grad():
        next(model.model.get_submodule(head).parameters())[0] = torch.inf
    with pytest.raises(TranscriptFormerError, match="are NaN or infinite"):
        generate(model, 2, n_genes=3, total_counts=9)
    with pytest.raises(TranscriptFormerError, match="are NaN or infinite"):
        generate(model, 1, prompt=list(model.gene_vocab.genes)[:2], n_genes=2, total_counts=9)  # draws nothing


def test_models_that_predict_no_genes(checkpoint_copy: Path) -> None:
    new_species = load(**{"model.inference_config.pretrained_embedding": [str(SYNTHETIC / "other_species_gene.h5")]})
    with pytest.raises(UsageError, match="new species has no gene head"):
        generate(new_species, 1, n_genes=3, total_counts=9)
    with pytest.raises(CheckpointError, match="no gene head"):
        generate(load(without_gene_head(checkpoint_copy)), 1, n_genes=3, total_counts=9)
    with pytest.raises(UsageError, match="trained on scaled counts"):
        generate(load(normalize_to_scale=1e4), 1, n_genes=3, total_counts=9)
