"""Attention in blocks of queries, whose scores stay in the cache, with gradients; no (T, T) matrix is in memory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from transcriptformer.model.attention.definition import SCORE_LIMIT, ScoreMod

QUERY_BLOCK = 256
"""Queries per block."""

MAX_SCORES = {"cpu": 2**21, "mps": 2**25, "cuda": 2**27}
"""Maximum number of scores in memory by device; at least those of one block of one head."""

MAX_UNSHIFTED = 60.0
"""Soft cap up to which exp does not overflow, and the maximum score need not be subtracted."""

MIN_TOTAL = 1e-30
"""Lower limit of the sum of weights, which is 0 for a query that sees no key."""


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, mod: ScoreMod) -> Tensor:
    """Compute `plain_attention` with matrix products in the dtype of `q`.

    Without gradients, queries may be fewer than keys; they are those of the last positions then.
    """
    if needs_gradients(q, k, v):
        return _Blockwise.apply(q, k, v, *mod)  # type: ignore[no-untyped-call]
    return _forward(q, k, v, mod)


def needs_gradients(*tensors: Tensor) -> bool:
    """Whether autograd records operations on `tensors`."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *mod: Any) -> Tensor:
        output = _forward(q, k, v, ScoreMod(*mod))
        key_bias, key_allowed, *ctx.options = mod
        ctx.save_for_backward(q, k, v, key_bias, key_allowed, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        q, k, v, key_bias, key_allowed, output = ctx.saved_tensors
        mod = ScoreMod(key_bias, key_allowed, *ctx.options)
        return *attention_gradients(gradient, output, q, k, v, mod), None, None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, mod: ScoreMod) -> Tensor:
    cells, heads, length, head_dim = q.shape
    before = k.shape[2] - length  # keys of earlier positions, in a cache
    cap = mod.softcap if mod.softcap > 0 else 1.0  # scaling q and the bias by 1 / cap saves a pass over the scores
    q = (q / (head_dim**0.5 * cap)).flatten(0, 1)  # (B·H, T, d)
    if before < length:  # two copies are faster than one strided copy
        k, v = k.contiguous().mT.contiguous(), v.contiguous()  # (B, H, d, T), (B, H, T, d)
    else:  # for few queries, copies of a cache would take longer than the products
        k = k.mT
    k, v = k.flatten(0, 1), v.flatten(0, 1)  # (B·H, d, T), (B·H, T, d)
    bias, mask = _per_head(mod.key_bias.float() / cap, heads), _per_head(mod.key_mask, heads)  # (B·H, 1, T)
    output = torch.empty(q.shape, dtype=v.dtype, device=v.device)
    for chunk, start, end in _blocks(cells * heads, length, q.device, before):
        seen = before + end
        x = torch.bmm(q[chunk, start:end], k[chunk, :, :seen]).float()  # (chunk, block, seen)
        weights = _weights(x, bias[chunk, :, :seen], mask[chunk, :, :seen], mod, out=x)
        output[chunk, start:end] = torch.bmm(weights.to(v.dtype), v[chunk, :seen])
    return output.view(cells, heads, length, head_dim)


def _weights(x: Tensor, bias: Tensor, mask: Tensor, mod: ScoreMod, out: Tensor | None = None) -> Tensor:
    """Compute the attention weights of a block of queries (chunk, block, end), whose own keys are the last ones.

    Parameters
    ----------
    x
        q · k / (√d · softcap), without the soft cap if there is none; afterwards with the bias, and its tanh if capped.
    bias, mask
        Bias of each key, divided like `x`, and its additive mask (chunk, 1, end).
    out
        Tensor for the result, which may be `x`.
    """
    start, end = x.shape[-1] - x.shape[-2], x.shape[-1]
    x += bias
    if not mod.bias_on_diagonal:
        x[..., start:].diagonal(dim1=-2, dim2=-1).sub_(bias[:, 0, start:end])
    if mod.softcap > 0:
        x.tanh_()
    weights = torch.add(mask, x, alpha=mod.softcap if mod.softcap > 0 else 1.0, out=out)
    own_block = weights[..., start:]  # (chunk, block, block)
    if not 0 < mod.softcap <= MAX_UNSHIFTED:
        own_block.masked_fill_(torch.ones_like(own_block[0], dtype=torch.bool).triu_(1), -torch.inf)
        weights -= weights.amax(-1, keepdim=True).clamp_(min=-SCORE_LIMIT)
    weights.exp_()
    own_block.tril_()
    weights /= weights.sum(-1, keepdim=True).clamp_(min=MIN_TOTAL)
    return weights


def attention_gradients(
    gradient: Tensor, output: Tensor, q: Tensor, k: Tensor, v: Tensor, mod: ScoreMod
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v (B, H, T, d) from the gradient of the output, block by block.

    With weights w = softmax(s), s = cap · tanh(x), x = (q · k / √d + bias) / cap, and the output o = w v:
    dv = wᵀ do; dw = do vᵀ; ds = w (dw − do · o); and ds / d(q · k / √d) = 1 − tanh²(x).
    """
    cells, heads, length, head_dim = q.shape
    cap = mod.softcap if mod.softcap > 0 else 1.0
    dtype, scale = q.dtype, 1 / head_dim**0.5
    gradient = gradient.to(dtype)
    sums = (gradient.float() * output.float()).sum(-1).flatten(0, 1)[..., None]  # do · o, (B·H, T, 1)
    q, k, v, gradient = (x.contiguous().flatten(0, 1) for x in (q, k, v, gradient))  # (B·H, T, d)
    scaled_q, k_turned, v_turned = q * (scale / cap), k.mT.contiguous(), v.mT.contiguous()
    bias, mask = _per_head(mod.key_bias.float() / cap, heads), _per_head(mod.key_mask, heads)  # (B·H, 1, T)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for chunk, start, end in _blocks(cells * heads, length, q.device):
        here = chunk, slice(start, end)
        x = torch.bmm(scaled_q[here], k_turned[chunk, :, :end]).float()  # (chunk, block, end)
        weights = _weights(x, bias[chunk, :, :end], mask[chunk, :, :end], mod)
        dv[chunk, :end] += torch.bmm(weights.mT.to(dtype), gradient[here])
        ds = torch.bmm(gradient[here], v_turned[chunk, :, :end]).float()
        ds = ds.sub_(sums[here]).mul_(weights)
        if mod.softcap > 0:
            ds = ds.mul_(x.square_().neg_().add_(1))
        ds = ds.mul_(scale).to(dtype)
        dq[here] = torch.bmm(ds, k[chunk, :end])
        dk[chunk, :end] += torch.bmm(ds.mT, q[here])
    shape = cells, heads, length, head_dim
    return dq.view(shape), dk.to(dtype).view(shape), dv.to(v.dtype).view(shape)


def _blocks(n_heads: int, length: int, device: torch.device, before: int = 0) -> Iterator[tuple[slice, int, int]]:
    """Yield a slice of the heads of all cells, and the start and stop of a block of queries.

    Parameters
    ----------
    before
        Number of keys before that of the first query.
    """
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        size = max(1, MAX_SCORES[device.type] // ((end - start) * (before + end)))
        for first in range(0, n_heads, size):
            yield slice(first, first + size), start, end


def _per_head(values: Tensor, heads: int) -> Tensor:
    """Repeat rows for each head: (B, T) → (B·H, 1, T)."""
    return values.repeat_interleave(heads, dim=0)[:, None]
