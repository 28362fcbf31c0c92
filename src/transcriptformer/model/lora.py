"""Low-rank adaptation (LoRA, Hu et al. 2021): train low-rank updates of frozen weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transcriptformer.model.layers import Linear
from transcriptformer.model.transcriptformer import TranscriptFormer

_A, _B = ".lora_a", ".lora_b"


class LoraLinear(Linear):
    """Linear layer W x + (alpha / rank) · B A x with trainable A (rank, in) and B (out, rank); B starts at 0.

    Parameters
    ----------
    base
        Layer whose weight and bias are used, and frozen.
    rank, alpha
        Rank and scale of the update.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = x.to(self.weight.dtype)
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(model: TranscriptFormer, rank: int, alpha: float) -> None:
    """Replace all attention projections and feed-forward layers by `LoraLinear`."""
    block: Any
    for block in model.transformer_encoder.encoder_layers:
        for i, linear in enumerate(block.self_attn.linears):
            block.self_attn.linears[i] = LoraLinear(linear, rank, alpha)
        block.linear1 = LoraLinear(block.linear1, rank, alpha)
        block.linear2 = LoraLinear(block.linear2, rank, alpha)


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the model without LoRA, with the updates merged into the weights."""
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            a, b = weights.pop(name + _A), weights.pop(name + _B)
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + module.scale * (b @ a)
    return weights
