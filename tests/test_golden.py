"""Our numbers are those of the published package, on synthetic cells and, where they are at hand, on real ones."""

import numpy as np
import pytest
import torch

from tests.golden_cases import TOLERANCE, GoldenCase, real_cases, relative_error, synthetic_cases
from transcriptformer.checkpoint import load_checkpoint
from transcriptformer.data.dataset import CellDataset
from transcriptformer.inference import embed
from transcriptformer.model.losses import gene_cross_entropy, mean_over_genes

each_case = pytest.mark.parametrize(
    "case",
    [
        *synthetic_cases("cell", "layer_0", "normalize", "clip5", "filters"),
        *real_cases("cell", "cell_no_assay", "normalize", "clip5", "filters"),
    ],
    ids=str,
)
each_attention = pytest.mark.parametrize("attention", ["plain", "fast"])


@each_attention
@each_case
def test_embeddings_and_llh_equal_the_reference(case: GoldenCase, attention: str) -> None:
    config = case.config(f"model.inference_config.attention={attention}")
    result = embed([case.source()], load_checkpoint(case.checkpoint, config), config)

    assert result.obsm["embeddings"].dtype == np.float32
    assert relative_error(result.obsm["embeddings"], case.expected["embeddings"]) < TOLERANCE
    assert relative_error(result.uns["llh"]["llh"].to_numpy(), case.expected["llh"]) < TOLERANCE


@each_attention
@each_case
def test_training_forward_equals_the_reference(case: GoldenCase, attention: str) -> None:
    config = case.config(f"model.inference_config.attention={attention}")
    checkpoint = load_checkpoint(case.checkpoint, config)
    model, settings = checkpoint.model, config.model
    dataset = CellDataset(
        [case.source()],
        checkpoint.gene_vocab,
        checkpoint.aux_vocabs,
        settings.data_config,
        settings.model_config.seq_len,
    )
    np.testing.assert_array_equal(dataset.tokens.lengths, case.expected["n_genes"])

    figures: dict[str, list[torch.Tensor]] = {name: [] for name in case.expected if name.startswith("train_")}
    with torch.inference_mode():
        for start in range(0, len(dataset), 16):
            batch = dataset.__getitems__(range(start, min(start + 16, len(dataset))))
            encoded = model(
                batch.gene_tokens,
                batch.gene_counts,
                batch.aux_tokens,
                layer=settings.inference_config.embedding_layer_index,
            )
            gene_nll = gene_cross_entropy(model.gene_logits(encoded), model.gene_targets(encoded))
            mu = model.expected_counts(encoded)
            figures["train_gene_nll"].append(mean_over_genes(gene_nll, encoded.is_gene))
            figures["train_count_nll"].append(model.count_nll(encoded, settings.data_config.clip_counts))
            figures["train_mu_sum"].append(mu.sum(1))
            figures["train_mu_max"].append(mu.amax(1))

    assert len(figures) == 4
    for name, parts in figures.items():
        assert relative_error(torch.cat(parts).numpy(), case.expected[name]) < TOLERANCE, name
