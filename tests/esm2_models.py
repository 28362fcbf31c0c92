"""Small random ESM-2 models of fair-esm, and their conversion to transformers."""

import re
from pathlib import Path

import esm
import torch
from safetensors.torch import save_file
from transformers import EsmConfig

LAYERS, WIDTH, HEADS = 3, 32, 4

_RENAMED = {
    r"^embed_tokens\.": "embeddings.word_embeddings.",
    r"^emb_layer_norm_after\.": "encoder.emb_layer_norm_after.",
    r"^layers\.(\d+)\.self_attn\.([qkv])_proj\.": r"encoder.layer.\1.attention.self.\2.",
    r"^layers\.(\d+)\.self_attn\.out_proj\.": r"encoder.layer.\1.attention.output.dense.",
    r"^layers\.(\d+)\.self_attn\.rot_emb\.": r"encoder.layer.\1.attention.self.rotary_embeddings.",
    r"^layers\.(\d+)\.self_attn_layer_norm\.": r"encoder.layer.\1.attention.LayerNorm.",
    r"^layers\.(\d+)\.fc1\.": r"encoder.layer.\1.intermediate.dense.",
    r"^layers\.(\d+)\.fc2\.": r"encoder.layer.\1.output.dense.",
    r"^layers\.(\d+)\.final_layer_norm\.": r"encoder.layer.\1.LayerNorm.",
    r"self\.q\.": "self.query.",
    r"self\.k\.": "self.key.",
    r"self\.v\.": "self.value.",
}


def random_esm2(layers: int = LAYERS, width: int = WIDTH, heads: int = HEADS, seed: int = 0) -> esm.ESM2:
    """Return a model whose weights and biases are large enough that every part affects the hidden states."""
    torch.manual_seed(seed)
    model = esm.ESM2(layers, width, heads)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3 if weight.ndim == 1 else 1.5 / weight.shape[1] ** 0.5)
            if "layer_norm" in name and name.endswith("weight"):
                weight.add_(1)
    return model.eval()


def convert(model: esm.ESM2, folder: Path) -> Path:
    """Save a model for transformers, with the file names of the published models."""
    folder.mkdir(parents=True)
    EsmConfig(
        vocab_size=len(model.alphabet),
        pad_token_id=model.padding_idx,
        mask_token_id=model.mask_idx,
        hidden_size=model.embed_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.attention_heads,
        intermediate_size=4 * model.embed_dim,
        max_position_embeddings=1026,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=True,
        architectures=["EsmForMaskedLM"],
    ).save_pretrained(folder)
    weights = {}
    for name, weight in model.state_dict().items():
        if not name.startswith(("lm_head", "contact_head")):
            for pattern, replacement in _RENAMED.items():
                name = re.sub(pattern, replacement, name)
            weights[f"esm.{name}"] = weight.clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
