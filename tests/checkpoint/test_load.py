import hashlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden_cases import CHECKPOINT
from transcriptformer.checkpoint.load import Checkpoint, load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.errors import CheckpointError, TranscriptFormerError
from transcriptformer.model.layers import Linear
from transcriptformer.model.transcriptformer import TranscriptFormer

EMBEDDING = "gene_embeddings.embedding.weight"

CPU_32 = {"model.inference_config.device": "cpu", "model.inference_config.precision": "32"}


def load(path: Path, **options: str) -> Checkpoint:
    named = {f"model.inference_config.{key}": value for key, value in options.items()}
    return load_checkpoint(path, load_config(path, CPU_32 | named))


def edit_weights(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = torch.load(path / "model_weights.pt", weights_only=True)
    edit(weights)
    torch.save(weights, path / "model_weights.pt")


def edit_config(path: Path, edit: Callable[[dict[str, dict[str, object]]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    edit(config["model"])
    (path / "config.json").write_text(json.dumps(config))


def test_every_tensor_in_the_file_is_loaded() -> None:
    weights = torch.load(CHECKPOINT / "model_weights.pt", weights_only=True)
    state = load(CHECKPOINT).model.state_dict()
    assert state.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)


def test_float32_weights_are_memory_mapped() -> None:
    model = load(CHECKPOINT).model
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list its mappings")
    mapped = [
        tuple(int(edge, 16) for edge in line.split()[0].split("-"))
        for line in maps.read_text().splitlines()
        if line.endswith(str(CHECKPOINT / "model_weights.pt"))
    ]
    assert all(any(start <= pointer < end for start, end in mapped) for pointer in storages)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_linear_layers_use_the_run_precision_and_the_rest_float32(precision: str) -> None:
    model = load(CHECKPOINT, precision=precision).model
    expected = {"32": torch.float32, "bf16-mixed": torch.bfloat16}[precision]
    linear = {id(p) for module in model.modules() if isinstance(module, Linear) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        is_cast = id(parameter) in linear and not name.startswith("gene_id_head")
        assert parameter.dtype == (expected if is_cast else torch.float32), name


def test_weights_hash_matches_the_file() -> None:
    expected = hashlib.sha256((CHECKPOINT / "model_weights.pt").read_bytes()).hexdigest()
    assert load(CHECKPOINT).weights_sha256() == expected


def test_weights_hash_is_that_of_the_loaded_file(checkpoint_copy: Path) -> None:
    checkpoint = load_checkpoint(checkpoint_copy, load_config(checkpoint_copy))
    weights = checkpoint_copy / "model_weights.pt"
    moved = weights.rename(checkpoint_copy / "moved.pt")
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        checkpoint.weights_sha256()
    weights.write_bytes(moved.read_bytes())
    with pytest.raises(CheckpointError, match="changed since it was loaded"):
        checkpoint.weights_sha256()
    weights.unlink()
    moved.rename(weights)
    assert checkpoint.weights_sha256() == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_biases_in_attention_and_feed_forward_are_loaded(checkpoint_copy: Path) -> None:
    edit_config(checkpoint_copy, lambda model: model["model_config"].update(attn_bias=True, fw_bias=True))

    def add_biases(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            if re.search(r"linears\.\d\.weight|linear[12]\.weight", name):
                weights[name.replace("weight", "bias")] = torch.arange(float(len(weights[name])))

    edit_weights(checkpoint_copy, add_biases)
    model = load(checkpoint_copy).model
    assert isinstance(model, TranscriptFormer)
    block = model.transformer_encoder.encoder_layers[1]
    torch.testing.assert_close(block.get_parameter("linear1.bias"), torch.arange(48.0))
    torch.testing.assert_close(block.get_parameter("self_attn.linears.3.bias"), torch.arange(32.0))


def test_no_gene_head_without_gene_loss(checkpoint_copy: Path) -> None:
    edit_config(checkpoint_copy, lambda model: model["loss_config"].update(gene_id_loss_weight=0.0))
    with pytest.raises(CheckpointError, match=r"unexpected: gene_id_head\.layers\.0\.weight"):
        load(checkpoint_copy)
    edit_weights(checkpoint_copy, lambda w: [w.pop(name) for name in list(w) if name.startswith("gene_id_head")])
    assert load(checkpoint_copy).model.gene_id_head is None


def test_all_mismatches_are_listed(checkpoint_copy: Path) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        weights["a.new.one"] = weights.pop("mu.gene_embedding.weight")
        weights["transformer_encoder.encoder_layers.0.norm1.weight"] = torch.ones(5)

    edit_weights(checkpoint_copy, damage)
    with pytest.raises(CheckpointError) as error:
        load(checkpoint_copy)
    message = str(error.value)
    assert "missing: mu.gene_embedding.weight" in message
    assert "unexpected: a.new.one" in message
    assert "encoder_layers.0.norm1.weight (5,) instead of (32,)" in message


def test_pickled_code_is_refused_and_not_executed(checkpoint_copy: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"

    class Malicious:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return Path.touch, (trace,)  # type: ignore[return-value]

    torch.save({"a": Malicious()}, checkpoint_copy / "model_weights.pt")
    with pytest.raises(CheckpointError, match="contains pickled code, which is never executed"):
        load(checkpoint_copy)
    assert not trace.exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model_weights.pt").unlink(), r"model_weights\.pt: missing"),
        (lambda path: truncate(path / "model_weights.pt"), r"model_weights\.pt: truncated"),
        (lambda path: (path / "model_weights.pt").write_bytes(b""), r"model_weights\.pt: truncated"),
        (lambda path: (path / "model_weights.pt").write_bytes(pickle.dumps({})), r"model_weights\.pt: truncated"),
        (lambda path: torch.save([torch.ones(1)], path / "model_weights.pt"), "not a state dict"),
        (lambda path: (path / "vocabs" / "homo_sapiens_gene.h5").unlink(), r"homo_sapiens_gene\.h5: vocabulary file"),
        (lambda path: (path / "vocabs" / "assay_vocab.json").unlink(), r"assay_vocab\.json: vocabulary file missing"),
        (lambda path: (path / "config.json").unlink(), r"config\.json: missing"),
        (lambda path: (path / "config.json").write_text("{"), r"config\.json: cannot be parsed as JSON"),
        (lambda path: (path / "config.json").write_text("{}"), r"config\.json: the key 'model' is missing"),
        (lambda path: edit_config(path, lambda m: m.pop("model_config")), "the key 'model.model_config' is missing"),
        (
            lambda path: edit_config(path, lambda m: m["model_config"].pop("num_heads")),
            "required key 'model.model_config.num_heads' is missing",
        ),
        (
            lambda path: edit_config(path, lambda m: m["data_config"].pop("esm2_mappings")),
            "required key 'model.data_config.esm2_mappings' is missing",
        ),
        (
            lambda path: edit_config(path, lambda m: m["model_config"].update(num_heads="many")),
            "model.model_config.num_heads': Value 'many'",
        ),
        (
            lambda path: edit_config(path, lambda m: m["model_config"].update(activation="swish")),
            r"config\.json: model\.model_config\.activation: 'swish' is not one of",
        ),
        (lambda path: edit_config(path, lambda m: m["model_config"].update(dropout=3)), r"config\.json: .*dropout"),
        (
            lambda path: edit_weights(path, lambda w: w.update({EMBEDDING: torch.tensor(1.0)})),
            rf"{EMBEDDING} has shape \(\)",
        ),
        (
            lambda path: edit_weights(path, lambda w: w.update({EMBEDDING: w[EMBEDDING].to_sparse()})),
            "not a state dict",
        ),
        (lambda path: edit_weights(path, lambda w: w.update({EMBEDDING: torch.ones(3).int()})), "not a state dict"),
        (lambda path: edit_config(path, lambda m: m["model_config"].update(aux_len=2)), "aux_len is 2, but aux_cols"),
    ],
)
def test_a_damaged_checkpoint_is_a_one_line_error_with_the_file(
    checkpoint_copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(checkpoint_copy)
    with pytest.raises(CheckpointError, match=message) as error:
        load(checkpoint_copy)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TranscriptFormerError, match="no such folder"):
        load(tmp_path / "nowhere")
