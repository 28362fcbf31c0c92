"""Probabilities of the next gene equal the reference's, sum to 1, and do not depend on the batch."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch

import transcriptformer
from tests.generation.checkpoints import load, without_gene_head
from tests.golden_cases import CHECKPOINT, SYNTHETIC
from tests.h5ad_files import GENES
from transcriptformer.data.batches import BatchLimits
from transcriptformer.errors import CheckpointError, TranscriptFormerError, UsageError
from transcriptformer.generation.next_genes import Answers, ask, log_probabilities, make_answers, next_genes
from transcriptformer.generation.prompts import aux_tokens, make_prompts, prompt_batches, require_gene_head

TOLERANCE = 1e-4
"""Absolute tolerance of log-probabilities in float32."""


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(SYNTHETIC / "expected" / "prompts.npz"))


def golden_prompts(golden: dict[str, np.ndarray], n: int | None = None) -> list[list[tuple[str, float]]]:
    """Return the first `n` genes of each prompt, with counts."""
    return [
        list(zip(genes[:length][:n].tolist(), counts[:length][:n].tolist(), strict=True))
        for genes, counts, length in zip(golden["genes"], golden["counts"], golden["n_genes"], strict=True)
    ]


@torch.inference_mode()
def test_all_positions_equal_the_reference(golden: dict[str, np.ndarray]) -> None:
    checkpoint = load()
    model = require_gene_head(checkpoint)
    assert checkpoint.gene_vocab.names().tolist() == golden["vocabulary"].tolist()
    prompts = make_prompts(golden_prompts(golden), checkpoint)
    aux = aux_tokens(checkpoint, len(prompts), {"assay": golden["aux"][:, 0].tolist()})
    answers = Answers(np.arange(len(checkpoint.gene_vocab)))
    compared = 0
    for batch in prompt_batches(prompts, aux, checkpoint, BatchLimits(2, 10_000)):
        hidden = model(batch.gene_tokens, batch.gene_counts, batch.aux_tokens).hidden
        log_p = answers.log_probabilities(model, hidden).numpy()
        for row, values in zip(batch.rows.tolist(), log_p, strict=True):
            n_positions = golden["n_genes"][row] + 1
            expected = golden["log_probability"][row, :n_positions]
            np.testing.assert_allclose(values[:n_positions], expected, atol=TOLERANCE)
            compared += n_positions
    assert compared == golden["n_genes"].sum() + len(prompts)


@pytest.mark.parametrize("n", [0, 1, 7, None])
@pytest.mark.parametrize("attention", ["blockwise", "plain"])
def test_the_gene_after_a_prompt_equals_the_reference(
    golden: dict[str, np.ndarray], n: int | None, attention: str
) -> None:
    checkpoint = load(**{"model.inference_config.attention": attention})
    prompts = golden_prompts(golden, n)
    result = next_genes(checkpoint, prompts, assay=golden["aux"][:, 0].tolist())
    n_special = len(checkpoint.gene_vocab.special_tokens)
    expected = [values[len(prompt)] for values, prompt in zip(golden["log_probability"], prompts, strict=True)]
    np.testing.assert_allclose(result.X, np.array(expected)[:, n_special:], atol=TOLERANCE)
    alone = golden["log_probability"][:, 0, n_special:]
    np.testing.assert_allclose(result.layers["pmi"], result.X - alone, atol=TOLERANCE)


def random_prompts(n: int, seed: int = 0, longest: int = 125) -> list[list[tuple[str, float]]]:
    rng = np.random.default_rng(seed)
    return [
        [(str(gene), int(rng.integers(1, 40))) for gene in rng.permutation(GENES)[: rng.integers(0, longest + 1)]]
        for _ in range(n)
    ]


def test_probabilities_sum_to_1_over_all_tokens() -> None:
    checkpoint = load()
    prompts = make_prompts(random_prompts(20), checkpoint)
    aux = aux_tokens(checkpoint, 20, {"assay": "Drop-seq"})
    for rows, log_p in log_probabilities(checkpoint, prompts, aux, Answers(np.arange(len(checkpoint.gene_vocab)))):
        assert log_p.shape == (len(rows), len(checkpoint.gene_vocab))
        np.testing.assert_allclose(np.exp(log_p).sum(1), 1, rtol=1e-5)
    genes = next_genes(checkpoint, [[GENES[0]]])
    assert 0.5 < np.exp(genes.X).sum() < 1, "special tokens keep their share"


def test_candidates_share_all_of_the_probability() -> None:
    checkpoint, candidates = load(), [GENES[9], "LGALS1", GENES[2]]
    prompts = random_prompts(5)
    among, of_all = (next_genes(checkpoint, prompts, candidates=c) for c in (candidates, None))
    assert among.var_names.tolist() == [GENES[9], "ENSG00000100097", GENES[2]]
    assert among.uns["renormalized_over"].tolist() == among.var_names.tolist()
    assert "renormalized_over" not in of_all.uns
    np.testing.assert_allclose(np.exp(among.X).sum(1), 1, rtol=1e-5)
    p = np.exp(of_all[:, among.var_names].X)
    np.testing.assert_allclose(np.exp(among.X), p / p.sum(1, keepdims=True), rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_a_batch_of_prompts_equals_each_alone(batch_size: object) -> None:
    checkpoint = load(**{"model.inference_config.batch_size": batch_size})
    prompts, assays = random_prompts(12), ["Drop-seq", None, "MERFISH"] * 4
    together = next_genes(checkpoint, prompts, assay=assays)
    for i, (prompt, assay) in enumerate(zip(prompts, assays, strict=True)):
        alone = next_genes(checkpoint, [prompt], assay=assay)
        np.testing.assert_allclose(together.X[i], alone.X[0], atol=2e-5)
        np.testing.assert_allclose(together.layers["pmi"][i], alone.layers["pmi"][0], atol=2e-5)


def test_the_order_of_genes_counts() -> None:
    first, second = random_prompts(1)[0], list(reversed(random_prompts(1)[0]))
    result = next_genes(load(), [first, second])
    assert not np.allclose(result.X[0], result.X[1], atol=1e-3)


def test_reduced_precision_is_close_and_its_head_exact() -> None:
    checkpoint = load(**{"model.inference_config.precision": "bf16-mixed"})
    head = require_gene_head(checkpoint).gene_id_head
    assert head is not None
    assert head.last_weight.dtype == torch.float32
    prompts = random_prompts(10)
    reduced, exact = next_genes(checkpoint, prompts), next_genes(load(), prompts)
    assert reduced.X.dtype == np.float32
    np.testing.assert_allclose(reduced.X, exact.X, atol=0.1)


def test_prompts_genes_and_provenance_are_described() -> None:
    checkpoint = load()
    result = transcriptformer.next_genes(checkpoint, [[("LGALS1", 3), GENES[0]], []], assay=["10X multiome", None])
    assert result.obs.to_dict("list") == {
        "genes": [f"ENSG00000100097=3 {GENES[0]}=1", ""],
        "n_genes": [2, 0],
        "assay": ["10x multiome", "unknown"],
    }
    assert result.var_names.tolist() == GENES
    assert result.var.loc["ENSG00000100097", "symbol"] == "LGALS1"
    provenance = result.uns["transcriptformer"]
    assert provenance["checkpoint"] == CHECKPOINT.name
    assert provenance["weights_sha256"] == checkpoint.weights_sha256()
    assert json.loads(provenance["config"])["model"]["model_config"]["seq_len"] == 127
    assert set(result.layers) == {"pmi"}
    assert (result.layers["pmi"][1] == 0).all(), "an empty prompt changes nothing"


def test_a_result_survives_a_file(tmp_path: Path) -> None:
    result = next_genes(load(), random_prompts(3), candidates=GENES[:20])
    result.write_h5ad(tmp_path / "next.h5ad")
    read = anndata.read_h5ad(tmp_path / "next.h5ad")
    np.testing.assert_array_equal(read.X, result.X)
    assert read.uns["renormalized_over"].tolist() == GENES[:20]


def test_bad_candidates_are_refused() -> None:
    bad: list[tuple[Any, str]] = [
        ([GENES[0]], "probabilities of 1 genes say nothing"),
        ([GENES[0], GENES[1], GENES[0]], "occurs twice"),
        ([GENES[0], "nonsense1"], "1 gene is not in the checkpoint's vocabulary"),
        ("LGALS1", "must be a list of genes, not the text 'LGALS1'"),
    ]
    for candidates, message in bad:
        with pytest.raises(UsageError, match=f"^candidates: .*{message}"):
            make_answers(candidates, load())


def test_checkpoints_that_predict_no_genes_are_refused(checkpoint_copy: Path) -> None:
    with pytest.raises(CheckpointError, match="has no gene head"):
        next_genes(load(without_gene_head(checkpoint_copy)), [[GENES[0]]])
    files = [str(SYNTHETIC / "other_species_gene.h5")]
    with pytest.raises(UsageError, match="a new species has no gene head"):
        next_genes(load(**{"model.inference_config.pretrained_embedding": files}), [[]])


def test_probabilities_that_are_no_numbers_are_refused(checkpoint_copy: Path) -> None:
    checkpoint = load(checkpoint_copy)
    require_gene_head(checkpoint).mu.gene_embedding.weight.fill_(torch.nan)
    assert np.isfinite(next_genes(checkpoint, [[GENES[0]]]).X).all(), "counts play no part"
    head = require_gene_head(checkpoint).gene_id_head
    assert head is not None
    head.last_weight[0, 0] = torch.nan
    with pytest.raises(TranscriptFormerError, match="probabilities are NaN"):
        next_genes(checkpoint, [[GENES[0]]])


def test_no_prompts_have_no_answers() -> None:
    assert next_genes(load(), []).shape == (0, len(GENES))


def test_progress_ends_with_all_prompts() -> None:
    checkpoint, told = load(**{"model.inference_config.batch_size": 2}), list[tuple[int, int]]()
    prompts = make_prompts(random_prompts(5), checkpoint)
    aux = aux_tokens(checkpoint, 5, {})
    ask(checkpoint, prompts, aux, make_answers(None, checkpoint), on_progress=lambda *done: told.append(done))
    assert told[-1] == (6, 6), "and the empty prompt that they are compared with"
    assert all(earlier < later for earlier, later in pairwise(told))


def test_metadata_that_the_checkpoint_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="tissue: the checkpoint was not trained with this metadata"):
        next_genes(load(), [[]], tissue="lung")
