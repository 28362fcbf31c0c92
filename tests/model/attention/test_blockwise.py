"""Gradients of the blockwise attention are those of the definition."""

import pytest
import torch

from transcriptformer.model.attention.blockwise import blockwise_attention
from transcriptformer.model.attention.definition import Attention, ScoreMod, plain_attention


def gradients(
    attention: Attention, length: int, softcap: float, on_diagonal: bool, dtype: torch.dtype
) -> list[torch.Tensor]:
    torch.manual_seed(length)
    q, k, v = (2 * torch.randn(2, 3, length, 8, dtype=dtype) for _ in range(3))
    for x in (q, k, v):
        x.requires_grad_()
    key_bias, key_allowed = 3 * torch.rand(2, length), torch.rand(2, length) > 0.2
    key_allowed[0, 0] = False  # a query without any key
    output = attention(q, k, v, ScoreMod(key_bias, key_allowed, softcap, on_diagonal))
    return [output, *torch.autograd.grad(output, (q, k, v), torch.randn(output.shape).to(dtype))]


@pytest.mark.parametrize("on_diagonal", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("length", [1, 5, 300])
def test_results_and_gradients_equal_the_definition(length: int, softcap: float, on_diagonal: bool) -> None:
    ours = gradients(blockwise_attention, length, softcap, on_diagonal, torch.float32)
    plain = gradients(plain_attention, length, softcap, on_diagonal, torch.float32)
    assert len(ours) == 4
    for a, b in zip(ours, plain, strict=True):
        largest = b.abs().max().clamp(min=1)  # which float32 rounds against, in sums whose order the processor decides
        torch.testing.assert_close(a / largest, b / largest, rtol=1e-5, atol=1e-5)
        assert (a - b).norm() <= 1e-6 * b.norm().clamp(min=1)


def test_half_precision_comes_near() -> None:
    ours = gradients(blockwise_attention, 300, 10.0, False, torch.bfloat16)
    exact = gradients(plain_attention, 300, 10.0, False, torch.float32)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() < 0.03 * b.norm()
