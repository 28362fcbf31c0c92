"""Results equal those of the published package, on synthetic cells and, if available, on real ones."""

import shutil

import numpy as np
import pytest
import torch

from tests.golden_cases import TOLERANCE, GoldenCase, real_cases, relative_error, synthetic_cases
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.data.survey import survey_cells
from transcriptformer.inference.embeddings import Embeddings
from transcriptformer.inference.run import embed
from transcriptformer.model.attention import flex
from transcriptformer.model.attention.choose import ATTENTION
from transcriptformer.model.attention.definition import Attention
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.batch_size import batch_limits
from transcriptformer.runs.inputs import Inputs

each_case = pytest.mark.parametrize(
    "case",
    [
        *synthetic_cases("cell", "layer_0", "normalize", "clip5", "filters"),
        *real_cases("cell", "cell_no_assay", "normalize", "clip5", "filters"),
    ],
    ids=str,
)
each_other_case = pytest.mark.parametrize(
    "case",
    [
        case
        for cases in (synthetic_cases, real_cases)
        for case in cases("esm2ce_cell", "new_species", "new_species_stale")
    ],
    ids=str,
)
each_gene_case = pytest.mark.parametrize(
    "case", [*synthetic_cases("cge", "esm2ce_cge"), *real_cases("cge", "esm2ce_cge")], ids=str
)
each_attention = pytest.mark.parametrize("attention", ["plain", "blockwise"])


@each_attention
@each_case
def test_embeddings_and_llh_equal_the_reference(case: GoldenCase, attention: str) -> None:
    assert_embeddings_equal(case, attention)


@each_attention
@each_other_case
def test_new_species_and_the_baseline_equal_the_reference(case: GoldenCase, attention: str) -> None:
    assert_embeddings_equal(case, attention)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@each_case
def test_embeddings_of_the_compiled_attention_equal_the_reference(
    case: GoldenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "MIN_LENGTH", 0)  # the synthetic cells are shorter than the default
    torch.compiler.reset()
    assert_embeddings_equal(case, "flex")


def assert_embeddings_equal(case: GoldenCase, attention: str) -> None:
    config = case.config(f"model.inference_config.attention={attention}")
    result = embed([case.source()], load_checkpoint(case.checkpoint, config))

    assert result.obsm["embeddings"].dtype == np.float32
    assert relative_error(result.obsm["embeddings"], case.expected["embeddings"]) < TOLERANCE
    if "llh" in case.expected:
        assert relative_error(result.uns["llh"]["llh"].to_numpy(), case.expected["llh"]) < TOLERANCE


@each_attention
@each_gene_case
def test_gene_embeddings_equal_the_reference(case: GoldenCase, attention: str) -> None:
    config = case.config(f"model.inference_config.attention={attention}")
    result = embed([case.source()], load_checkpoint(case.checkpoint, config)).uns

    np.testing.assert_array_equal(result["cge_cell_indices"], case.expected["cge_cell_indices"])
    np.testing.assert_array_equal(result["cge_gene_names"], case.expected["cge_gene_names"])
    assert result["cge_embeddings"].dtype == np.float32
    assert relative_error(result["cge_embeddings"], case.expected["cge_embeddings"]) < TOLERANCE


@each_attention
@each_case
def test_training_forward_equals_the_reference(case: GoldenCase, attention: str) -> None:
    with torch.inference_mode():
        assert_training_forward_equal(case, ATTENTION[attention])


@pytest.mark.parametrize("case", synthetic_cases("cell", "normalize", "clip5"), ids=str)
def test_training_forward_with_gradients_equals_the_reference(case: GoldenCase) -> None:
    assert_training_forward_equal(case, ATTENTION["blockwise"])


def assert_training_forward_equal(case: GoldenCase, attention: Attention) -> None:
    config = case.config()
    checkpoint = load_checkpoint(case.checkpoint, config)
    model, settings = checkpoint.model, config.model
    assert isinstance(model, TranscriptFormer)
    model.transformer_encoder.attention = attention
    model.transformer_encoder.requires_grad_(torch.is_grad_enabled())
    inputs = Inputs([case.source()], Embeddings(checkpoint))
    survey = survey_cells(inputs.readers, settings.data_config)
    lengths = np.minimum(survey.lengths[survey.kept], settings.model_config.seq_len)
    np.testing.assert_array_equal(lengths, case.expected["n_genes"])

    names = [name for name in case.expected if name.startswith("train_")]
    figures = {name: np.full(survey.n_kept, np.nan, np.float32) for name in names}
    for batch in inputs.loader(survey, batch_limits(checkpoint), 0, 1, np.zeros(survey.n_kept, bool)):
        encoded = model(
            batch.gene_tokens,
            batch.gene_counts,
            batch.aux_tokens,
            layer=settings.inference_config.embedding_layer_index,
        )
        mu = model.expected_counts(encoded)
        of_batch = {
            "train_gene_nll": model.gene_nll(encoded),
            "train_count_nll": model.count_nll(encoded, settings.data_config.clip_counts),
            "train_mu_sum": mu.sum(1),
            "train_mu_max": mu.amax(1),
        }
        for name, values in of_batch.items():
            figures[name][batch.rows] = values.detach()

    assert len(figures) == 4
    for name, array in figures.items():
        assert relative_error(array, case.expected[name]) < TOLERANCE, name
