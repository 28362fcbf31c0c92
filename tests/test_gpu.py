"""Results, attention paths and the pipeline on a CUDA device; skipped without one (`make test-gpu`)."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch

from tests.golden_cases import CELLS, CHECKPOINT, TOLERANCE, GoldenCase, relative_error, synthetic_cases
from tests.h5ad_files import random_adata
from tests.training.training_runs import config_of, losses, write_cells
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.data.batches import Batch
from transcriptformer.inference.embeddings import Embeddings
from transcriptformer.inference.module import TranscriptFormerModule
from transcriptformer.inference.run import embed
from transcriptformer.model.attention.blockwise import blockwise_attention
from transcriptformer.model.attention.definition import Attention, ScoreMod, count_bias, plain_attention
from transcriptformer.model.attention.flex import flex_attention
from transcriptformer.training.run import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
HALF_TOLERANCE = 2e-2
"""The same as for bfloat16 on a CPU."""


def on_gpu(source: object, **inference: object) -> anndata.AnnData:
    settings = {"device": "cuda", "precision": "32", **inference}
    options = {f"model.inference_config.{key}": value for key, value in settings.items()}
    return embed([source], load_checkpoint(CHECKPOINT, load_config(CHECKPOINT, options)))


@pytest.mark.parametrize("attention", ["plain", "blockwise", "flex"])
@pytest.mark.parametrize(
    "case",
    synthetic_cases("cell", "layer_0", "normalize", "clip5", "esm2ce_cell", "new_species", "new_species_stale"),
    ids=str,
)
def test_embeddings_and_llh_equal_the_reference(case: GoldenCase, attention: str) -> None:
    overrides = ("model.inference_config.device=cuda", f"model.inference_config.attention={attention}")
    result = embed([case.source()], load_checkpoint(case.checkpoint, case.config(*overrides)))
    assert relative_error(result.obsm["embeddings"], case.expected["embeddings"]) < TOLERANCE
    if "llh" in case.expected:
        assert relative_error(result.uns["llh"]["llh"].to_numpy(), case.expected["llh"]) < TOLERANCE


@pytest.mark.parametrize("case", synthetic_cases("cge", "esm2ce_cge"), ids=str)
def test_gene_embeddings_equal_the_reference(case: GoldenCase) -> None:
    config = case.config("model.inference_config.device=cuda")
    result = embed([case.source()], load_checkpoint(case.checkpoint, config)).uns
    assert relative_error(result["cge_embeddings"], case.expected["cge_embeddings"]) < TOLERANCE


@pytest.mark.parametrize("attention", ["plain", "blockwise", "flex"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_half_precision_is_close_to_float32(precision: str, attention: str) -> None:
    exact = on_gpu(CELLS).obsm["embeddings"]
    assert relative_error(on_gpu(CELLS, precision=precision, attention=attention).obsm["embeddings"], exact) < (
        HALF_TOLERANCE
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("on_diagonal", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 10.0])
def test_attention_is_the_same_on_every_path(dtype: torch.dtype, on_diagonal: bool, softcap: float) -> None:
    torch.compiler.reset()
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 4, 700, 64, generator=generator, device="cuda").to(dtype) for _ in range(3))
    bias = count_bias(30 * torch.rand(2, 700, generator=generator, device="cuda"), 1e-6)
    allowed = torch.rand(2, 700, generator=generator, device="cuda") < 0.9
    allowed[:, 0] = False
    exact = plain_attention(q.float(), k.float(), v.float(), ScoreMod(bias, allowed, softcap, on_diagonal))
    tolerance = 1e-3 if dtype == torch.float32 else HALF_TOLERANCE  # the compiled kernel multiplies in TF32
    with torch.inference_mode():
        for path in (blockwise_attention, flex_attention):
            result = path(q, k, v, ScoreMod(bias, allowed, softcap, on_diagonal)).float()
            assert (result - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("emb_type", ["cell", "cge"])
def test_batches_do_not_synchronize_the_device(emb_type: str) -> None:
    options = {"device": "cuda", "emb_type": emb_type, "output_keys": ["embeddings", "llh"]}
    config = load_config(CHECKPOINT, {f"model.inference_config.{key}": value for key, value in options.items()})
    checkpoint = load_checkpoint(CHECKPOINT, config)
    module = Embeddings(checkpoint).make_module().cuda()
    assert isinstance(module, TranscriptFormerModule)
    module.prepare(np.array([31] * 4), torch.device("cuda"))
    tokens = torch.randint(7, 200, (4, 32)).pin_memory()
    batch = Batch(torch.arange(4), tokens, torch.ones(4, 32).pin_memory(), torch.zeros(4, 1, dtype=torch.int64))
    on_device = batch.to(torch.device("cuda"))
    with torch.inference_mode():
        module(on_device)  # warm-up
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            module(on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_result_does_not_depend_on_the_batch_size() -> None:
    cells = random_adata(300)
    auto, small = (on_gpu(cells, batch_size=size).obsm["embeddings"] for size in ("auto", 7))
    assert relative_error(small, auto) < TOLERANCE


def test_a_second_run_of_the_same_checkpoint_is_the_same() -> None:
    """Between the runs, the model is moved off the device and back."""
    options = {"model.inference_config.device": "cuda", "model.inference_config.precision": "32"}
    checkpoint = load_checkpoint(CHECKPOINT, load_config(CHECKPOINT, options))
    first, second = (embed([CELLS], checkpoint).obsm["embeddings"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("length", [100, 384, 700])
@pytest.mark.parametrize("attention", [flex_attention, blockwise_attention], ids=["flex", "blockwise"])
def test_gradients_equal_the_definition(attention: Attention, length: int) -> None:
    """Includes a query without allowed keys, such as that of an unknown assay."""
    found = []
    for path in (attention, plain_attention):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 4, length, 32, device="cuda", requires_grad=True) for _ in range(3))
        bias, allowed = torch.rand(2, length, device="cuda"), torch.rand(2, length, device="cuda") > 0.2
        allowed[0, 0] = False
        output = path(q, k, v, ScoreMod(bias, allowed, 10.0, False))
        weights = torch.randn(output.shape, device="cuda")
        found.append([output, *torch.autograd.grad(output, (q, k, v), weights)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["32", "16-mixed", "bf16-mixed"])
def test_training_losses_on_a_gpu_match_a_cpu(tmp_path: Path, precision: str) -> None:
    cells = write_cells(tmp_path / "cells.h5ad")
    settings: dict[str, Any] = {"model__model_config__dropout": 0.0, "model__model_config__seq_len": 127}
    fit(config_of(tmp_path / "cpu", cells, **settings))
    fit(config_of(tmp_path / "gpu", cells, device="cuda", precision=precision, **settings))
    np.testing.assert_allclose(
        losses(tmp_path / "gpu"),
        losses(tmp_path / "cpu"),
        rtol=1e-3 if precision == "32" else HALF_TOLERANCE,
        atol=1e-3,
    )
