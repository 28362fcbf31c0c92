"""Attention in blocks with gradients, for training: nothing of the size of all scores is kept or made."""

from typing import Any

import torch
from torch import Tensor

from transcriptformer.model.attention.definition import (
    LEAST_TOTAL,
    QUERY_BLOCK,
    SCORE_LIMIT,
    SCORES_AT_ONCE,
    blockwise_attention,
    hiding,
    per_head,
    slices,
)


def trainable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    key_allowed: Tensor,
    softcap: float,
    bias_on_diagonal: bool,
) -> Tensor:
    """The same as `plain_attention`, with the same parameters and result."""
    if not needs_gradients(q, k, v):
        return blockwise_attention(q, k, v, key_bias, key_allowed, softcap, bias_on_diagonal)
    return _Blockwise.apply(q, k, v, key_bias, key_allowed, softcap, bias_on_diagonal)  # type: ignore[no-untyped-call]


def needs_gradients(*tensors: Tensor) -> bool:
    """Whether what is computed from `tensors` now will be differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = blockwise_attention(*inputs)
        *tensors, ctx.softcap, ctx.bias_on_diagonal = inputs
        ctx.save_for_backward(*tensors, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        q, k, v, key_bias, key_allowed, output = ctx.saved_tensors
        inputs = q, k, v, key_bias, key_allowed, ctx.softcap, ctx.bias_on_diagonal
        gradients = attention_gradients(gradient, output, *inputs)
        return *gradients, None, None, None, None


def attention_gradients(
    gradient: Tensor,
    output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    key_allowed: Tensor,
    softcap: float,
    bias_on_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (B, H, T, d) from that of the result, block by block of queries.

    With weights w = softmax(s), s = cap · tanh(x), x = (q · k / √d + bias) / cap, and the result o = w v:
    dv = wᵀ do; dw = do vᵀ; ds = w (dw − do · o); and ds / d(q · k / √d) = 1 − tanh²(x).
    """
    cells, heads, length, head_dim = q.shape
    cap = softcap if softcap > 0 else 1.0
    dtype, scale = q.dtype, 1 / head_dim**0.5
    gradient = gradient.to(dtype)
    sums = (gradient.float() * output.float()).sum(-1).flatten(0, 1)[..., None]  # do · o, (B·H, T, 1)
    q, k, v, gradient = (x.contiguous().flatten(0, 1) for x in (q, k, v, gradient))  # (B·H, T, d)
    scaled_q, k_turned, v_turned = q * (scale / cap), k.mT.contiguous(), v.mT.contiguous()
    bias, hidden = per_head(key_bias.float() / cap, heads), per_head(hiding(key_allowed), heads)  # (B·H, 1, T)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        for few in slices(cells * heads, SCORES_AT_ONCE[q.device.type] // ((end - start) * end)):
            here = few, slice(start, end)
            x = torch.bmm(scaled_q[here], k_turned[few, :, :end]).float()  # (few, block, end)
            x += bias[few, :, :end]
            if not bias_on_diagonal:
                x[..., start:].diagonal(dim1=-2, dim2=-1).sub_(bias[few, 0, start:end])
            if softcap > 0:
                x.tanh_()
                weights = torch.add(hidden[few, :, :end], x, alpha=cap).exp_()
            else:
                weights = x + hidden[few, :, :end]
                behind = torch.ones_like(weights[0, :, start:], dtype=torch.bool).triu_(1)
                weights[..., start:].masked_fill_(behind, -torch.inf)
                weights = weights.sub_(weights.amax(-1, keepdim=True).clamp_(min=-SCORE_LIMIT)).exp_()
            weights[..., start:].tril_()
            weights /= weights.sum(-1, keepdim=True).clamp_(min=LEAST_TOTAL)
            dv[few, :end] += torch.bmm(weights.mT.to(dtype), gradient[here])
            ds = torch.bmm(gradient[here], v_turned[few, :, :end]).float()
            ds = ds.sub_(sums[here]).mul_(weights)
            if softcap > 0:
                ds = ds.mul_(x.square_().neg_().add_(1))
            ds = ds.mul_(scale).to(dtype)
            dq[here] = torch.bmm(ds, k[few, :end])
            dk[few, :end] += torch.bmm(ds.mT, q[here])
    shape = cells, heads, length, head_dim
    return dq.view(shape), dk.to(dtype).view(shape), dv.to(v.dtype).view(shape)
