"""The compiled attention equals the definition."""

import shutil

import pytest
import torch

from transcriptformer.model.attention.blockwise import blockwise_attention
from transcriptformer.model.attention.definition import Attention, ScoreMod, count_bias, plain_attention
from transcriptformer.model.attention.flex import flex_attention, look_up_bias

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
quietly = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys, values, biases of the keys, and which of them are allowed."""


@pytest.fixture(autouse=True)
def forget_what_is_compiled() -> None:
    """A function is compiled a few times at most; these tests ask for more."""
    torch.compiler.reset()


def random_case(seed: int, cells: int, length: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (2 * torch.randn(cells, length, 3, 24, generator=generator).transpose(1, 2) for _ in range(3))
    bias = count_bias(30 * torch.rand(cells, length, generator=generator), 1e-6)
    allowed = torch.rand(cells, length, generator=generator) < 0.8
    allowed[0, :2] = False  # queries without any key, and an unknown auxiliary token
    return q, k, v, bias, allowed


@pytest.mark.slow
@needs_compiler
@quietly
@pytest.mark.parametrize("softcap", [0.0, 10.0])
def test_the_compiled_attention_agrees_with_the_definition(softcap: float) -> None:
    with torch.inference_mode():
        for seed, (cells, length) in enumerate([(2, 384), (3, 385), (2, 584), (2, 1000), (3, 40)]):
            case = random_case(seed, cells, length)
            assert_agrees(flex_attention, case, softcap, True)


@quietly
@pytest.mark.parametrize("softcap", [0.0, 10.0])
@pytest.mark.parametrize("on_diagonal", [True, False])
def test_what_a_gpu_compiles_agrees_with_the_definition(softcap: float, on_diagonal: bool) -> None:
    with torch.compiler.set_stance("force_eager"):
        assert_agrees(look_up_bias, random_case(0, 3, 150), softcap, on_diagonal)


def assert_agrees(path: Attention, case: Case, softcap: float, on_diagonal: bool) -> None:
    q, k, v, bias, allowed = case
    plain = plain_attention(q, k, v, ScoreMod(bias, allowed, softcap, on_diagonal))
    assert (path(q, k, v, ScoreMod(bias, allowed, softcap, on_diagonal)) - plain).norm() <= 1e-5 * plain.norm()


def test_on_a_cpu_gradients_are_blockwise() -> None:
    q, k, v, bias, allowed = random_case(0, 2, 384)
    q.requires_grad_()
    gradients = [
        torch.autograd.grad(path(q, k, v, ScoreMod(bias, allowed, 10.0, False)).sum(), q)[0]
        for path in (flex_attention, blockwise_attention)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.slow
@needs_compiler
@quietly
def test_in_bfloat16_it_is_as_near_to_the_definition_as_attention_in_blocks() -> None:
    q, k, v, bias, allowed = random_case(0, 2, 700)
    exact = plain_attention(q, k, v, ScoreMod(bias, allowed, 10.0, True))
    q, k, v = (x.bfloat16() for x in (q, k, v))
    with torch.inference_mode():
        compiled, in_blocks = (
            (path(q, k, v, ScoreMod(bias, allowed, 10.0, True)).float() - exact).norm() / exact.norm()
            for path in (flex_attention, blockwise_attention)
        )
    assert compiled < 2 * in_blocks < 2e-2
