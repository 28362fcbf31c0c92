"""Prompts are checked, clipped as cells are, and batched by length without a change."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.generation.checkpoints import load, without_gene_head
from tests.golden_cases import SYNTHETIC
from tests.h5ad_files import GENES
from transcriptformer.data.batches import BatchLimits
from transcriptformer.errors import CheckpointError, UsageError
from transcriptformer.generation.prompts import (
    aux_tokens,
    longest_prompt,
    make_prompts,
    parse_gene_count,
    prompt_batches,
    require_gene_head,
)


def test_genes_keep_their_order_and_counts_are_clipped(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = load()
    with caplog.at_level(logging.INFO, "transcriptformer"):
        first, second = make_prompts([[(GENES[4], 3), "LGALS1", (GENES[0], 99)], []], checkpoint, "--gene")
    assert checkpoint.gene_vocab.names()[first.tokens].tolist() == [GENES[4], "ENSG00000100097", GENES[0]]
    assert first.counts.tolist() == [3, 1, 30]
    assert second.tokens.shape == second.counts.shape == (0,)
    assert caplog.messages == ["--gene: clipped 1 of 3 counts at 30, as in training"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([(GENES[0], 0)], f"--gene: count 0 of {GENES[0]} is not a whole number of at least 1"),
        ([(GENES[0], -1)], "count -1 of"),
        ([(GENES[0], 1.5)], "count 1.5 of"),
        ([(GENES[0], float("nan"))], "count nan of"),
        ([(GENES[0], float("inf"))], "count inf of"),
        ([(GENES[0], "3")], "count '3' of"),
        ("LGALS1", "--gene: each prompt must be a list of genes, not a text"),
        (["ENSG00000100097", ("LGALS1", 2)], "--gene: gene ENSG00000100097 occurs twice"),
        (GENES[:126], "--gene: 126 genes; the model takes at most 125"),
    ],
)
def test_a_bad_prompt_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"{re.escape(message)}"):
        make_prompts([prompt], load(), "--gene")


def test_a_bad_prompt_among_several_is_named() -> None:
    with pytest.raises(UsageError, match=r"^prompts, prompt 2: gene .* occurs twice$"):
        make_prompts([[GENES[0]], [GENES[1], GENES[1]]], load())


def test_counts_that_were_scaled_in_training_are_refused() -> None:
    with pytest.raises(UsageError, match="use cells of a file"):
        make_prompts([[GENES[0]]], load(normalize_to_scale=10_000))


def test_the_longest_prompt_leaves_a_gene_to_predict() -> None:
    """The model has 127 positions; at the last one, it has learned the end of the cell."""
    checkpoint = load()
    assert longest_prompt(checkpoint) == require_gene_head(checkpoint).max_genes - 1 == 125
    assert len(make_prompts([GENES[:125]], checkpoint)[0].tokens) == 125
    assert len(make_prompts([GENES[:127]], checkpoint, max_genes=127)[0].tokens) == 127


@pytest.mark.parametrize(("text", "expected"), [("A=3", ("A", 3)), ("A", ("A", 1)), ("A=B=2", ("A=B", 2))])
def test_genes_and_counts_are_parsed(text: str, expected: tuple[str, float]) -> None:
    assert parse_gene_count(text, "--gene") == expected


def test_a_count_that_is_no_number_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--gene A=x: 'x' is not a count"):
        parse_gene_count("A=x", "--gene")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [0, 0]),
        ({"assay": None}, [0, 0]),
        ({"assay": "10x multiome"}, [1, 1]),
        ({"assay": ["10X  Multiome", None]}, [1, 0]),
        ({"assay": pd.Series([np.nan, "MERFISH"])}, [0, 3]),
        ({"assay": ["EFO:0009922", "Drop-seq"]}, [2, 4]),
        ({"assay": "unknown", "tissue": None}, [0, 0]),
    ],
)
def test_assays_are_spelled_as_in_files(values: dict[str, Any], expected: list[int]) -> None:
    assert aux_tokens(load(), 2, values)[:, 0].tolist() == expected


def test_an_unknown_assay_is_said_with_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    assert aux_tokens(load(), 2, {"assay": "Drop-sek"}).tolist() == [[0], [0]]
    assert caplog.messages == ["unknown assay 'Drop-sek'; nearest known: 'Drop-seq'"]


def test_metadata_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="assay: 3 values for 2 prompts"):
        aux_tokens(load(), 2, {"assay": ["Drop-seq"] * 3})
    with pytest.raises(UsageError, match="tissue: the checkpoint was not trained with this metadata; its columns are"):
        aux_tokens(load(), 2, {"tissue": "lung"})


def test_batches_hold_every_prompt_once_within_the_limits() -> None:
    checkpoint, rng = load(), np.random.default_rng(0)
    lengths = [0, 1, 125, 3, 1, 60, 124, *rng.integers(0, 126, 40)]
    prompts = make_prompts([[(gene, i % 7 + 1) for gene in GENES[:n]] for i, n in enumerate(lengths)], checkpoint)
    aux = aux_tokens(checkpoint, len(prompts), {"assay": ["Drop-seq", None] * 23 + ["MERFISH"]})
    rows = []
    for batch in prompt_batches(prompts, aux, checkpoint, BatchLimits(8, 256)):
        n_rows, n_positions = batch.gene_tokens.shape
        assert n_rows <= 8
        assert n_rows == 1 or n_rows * n_positions <= 256
        assert n_positions == max(lengths[row] for row in batch.rows.tolist()) + 1
        for row, tokens, counts, aux_row in zip(batch.rows.tolist(), *batch[1:], strict=True):
            n_genes = lengths[row]
            np.testing.assert_array_equal(tokens[:n_genes], prompts[row].tokens)
            np.testing.assert_array_equal(counts[:n_genes], prompts[row].counts)
            assert (tokens[n_genes:] == checkpoint.gene_vocab.pad).all()
            assert aux_row.tolist() == aux[row].tolist()
            rows.append(row)
    assert sorted(rows) == list(range(len(prompts)))
    assert not list(prompt_batches([], aux[:0], checkpoint, BatchLimits(8, 256)))


def test_checkpoints_that_predict_no_genes_are_refused(checkpoint_copy: Path) -> None:
    assert require_gene_head(load()) is not None
    with pytest.raises(UsageError, match="the baseline predicts no genes"):
        require_gene_head(load(**{"model.model_type": "esm2ce"}))
    files = [str(SYNTHETIC / "other_species_gene.h5")]
    with pytest.raises(UsageError, match="a new species has no gene head"):
        require_gene_head(load(**{"model.inference_config.pretrained_embedding": files}))
    with pytest.raises(CheckpointError, match="has no gene head; it was trained with gene_id_loss_weight 0"):
        require_gene_head(load(without_gene_head(checkpoint_copy)))
