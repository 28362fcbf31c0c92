"""Low-rank updates: nothing at the start, the same as merged weights at the end."""

import torch

from tests.golden_cases import CHECKPOINT
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.model.lora import LoraLinear, add_lora, merged_state_dict
from transcriptformer.model.transcriptformer import TranscriptFormer


def a_model() -> TranscriptFormer:
    model = load_checkpoint(CHECKPOINT, load_config(CHECKPOINT, {"model.inference_config.precision": "32"})).model
    assert isinstance(model, TranscriptFormer)
    return model


def hidden(model: TranscriptFormer) -> torch.Tensor:
    torch.manual_seed(0)
    genes, counts = torch.randint(7, 100, (3, 20)), torch.randint(1, 9, (3, 20)).float()
    with torch.no_grad():
        return model(genes, counts, torch.ones(3, 1, dtype=torch.long)).hidden


def test_a_model_computes_the_same_until_updates_are_learned() -> None:
    model = a_model()
    before = hidden(model)
    add_lora(model, rank=2, alpha=4)
    torch.testing.assert_close(hidden(model), before)


def test_merged_weights_compute_what_updates_beside_them_do() -> None:
    model, merged = a_model(), a_model()
    names = set(model.state_dict())
    add_lora(model, rank=2, alpha=4)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            torch.nn.init.normal_(module.lora_b)
    weights = merged_state_dict(model)
    assert set(weights) == names
    merged.load_state_dict(weights)
    assert not torch.allclose(hidden(merged), hidden(a_model()), atol=1e-2)
    torch.testing.assert_close(hidden(merged), hidden(model), rtol=1e-4, atol=1e-4)


def test_six_layers_of_each_block_are_adapted_and_their_own_weights_frozen() -> None:
    model = a_model()
    add_lora(model, rank=2, alpha=4)
    adapted = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(adapted) == 6 * model.config.num_layers
    assert not any(module.weight.requires_grad for module in adapted)
    assert all(module.lora_a.requires_grad and module.lora_b.requires_grad for module in adapted)
