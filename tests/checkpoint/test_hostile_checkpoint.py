"""Untrusted checkpoints: every invalid value is a one-line error, raised promptly and before any computation."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.golden_cases import CELLS, CHECKPOINT
from tests.h5ad_files import random_adata
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.errors import CheckpointError, TranscriptFormerError, UsageError
from transcriptformer.inference.run import embed, run
from transcriptformer.model.label_head import LabelHead
from transcriptformer.runs.recording import check_finite
from transcriptformer.training.config import load_train_config

CPU_32 = {"model.inference_config.device": "cpu", "model.inference_config.precision": "32"}
SECONDS = 10


def load(path: Path, **options: object) -> None:
    load_checkpoint(path, load_config(path, CPU_32 | {f"model.inference_config.{k}": v for k, v in options.items()}))


def assert_refused(path: Path, message: str, **options: object) -> None:
    """Loading fails with a one-line error within `SECONDS`."""
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as refusal:
        load(path, **options)
    assert time.monotonic() - started < SECONDS
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1_000


def edit_config(path: Path, section: str, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    config["model"][section].update(values)
    (path / "config.json").write_text(json.dumps(config))


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model_config", "num_layers", 10**9, "num_layers: must be from 1 to 1,000, not 1000000000"),
        ("model_config", "num_layers", 1000, "does not match config.json: it has 2 layers, but num_layers is 1000"),
        ("model_config", "num_layers", -1, "num_layers: must be from 1 to"),
        ("model_config", "num_heads", 0, "num_heads: must be from 1 to"),
        ("model_config", "embed_dim", 2**40, "embed_dim: must be from 1 to"),
        ("model_config", "model_dim", 2**63, "model_dim: must be from 1 to"),
        ("model_config", "gene_head_hidden_dim", 10**30, "gene_head_hidden_dim: must be from 1 to"),
        ("model_config", "seq_len", 10**30, "seq_len: must be from 1 to"),
        ("model_config", "seq_len", 2**31, "seq_len: must be from 1 to"),
        ("model_config", "aux_len", -1, "aux_len: must be from 0 to"),
        ("model_config", "log_counts_eps", NAN, "log_counts_eps: must be from 0 to 1, not nan"),
        ("model_config", "log_counts_eps", -1, "log_counts_eps: must be from 0 to 1"),
        ("model_config", "softcap", INF, "softcap: must be from 0 to"),
        ("model_config", "softcap", 10**400, "softcap|float"),
        ("model_config", "dropout", NAN, "dropout: must be from 0 to 1, not nan"),
        ("data_config", "clip_counts", INF, "clip_counts .*: must be more than 0, at most 1e[+]30, not inf"),
        ("data_config", "normalize_to_scale", NAN, "normalize_to_scale: must be from 0 to"),
        ("data_config", "filter_outliers", INF, "filter_outliers: must be from 0 to"),
        ("data_config", "min_expressed_genes", 10**30, "min_expressed_genes: must be from 0 to"),
        ("data_config", "n_data_workers", 10**6, "n_data_workers .*: must be from 0 to 1,024"),
        ("loss_config", "gene_id_loss_weight", NAN, "gene_id_loss_weight: must be from 0 to"),
        ("data_config", "esm2_mappings", ["../../x.h5"], "esm2_mappings: '../../x.h5' is not the name of a file"),
        ("data_config", "esm2_mappings", ["/etc/passwd"], "esm2_mappings: '/etc/passwd' is not the name of a file"),
        ("data_config", "esm2_mappings", [".."], "esm2_mappings: '..' is not the name of a file"),
        ("data_config", "esm2_mappings", ["a\x00b"], "esm2_mappings: .* is not the name of a file"),
        (
            "data_config",
            "aux_cols",
            ["../assay"],
            "aux_cols: '../assay' is empty, starts or ends with a blank",
        ),
        ("data_config", "aux_cols", ["assay", "assay"], "aux_cols: names are not unique"),
        ("data_config", "aux_cols", [None], "aux_cols"),
        ("data_config", "special_tokens", ["unknown", "[PAD]", "[PAD]"], "special_tokens: names are not unique"),
        ("data_config", "gene_col_name", "${oc.env:HOME}", "gene_col_name: .* is an interpolation"),
        ("data_config", "special_tokens", ["${oc.env:HOME}"], "special_tokens: .* is an interpolation"),
    ],
)
def test_an_invalid_value_is_refused(
    checkpoint_copy: Path, section: str, key: str, value: object, message: str
) -> None:
    edit_config(checkpoint_copy, section, **{key: value})
    assert_refused(checkpoint_copy, rf"config\.json: .*({message})|model_weights\.pt: ({message})")


def test_a_checkpoint_cannot_allow_external_links(checkpoint_copy: Path) -> None:
    edit_config(checkpoint_copy, "data_config", allow_external_links=True)
    assert load_config(checkpoint_copy).model.data_config.allow_external_links is False
    options = {"training.data_files": ["x"], "training.checkpoint_path": str(checkpoint_copy)}
    overrides = ["model.model_config.aux_len=1", "model.data_config.aux_cols=[assay]"]
    assert load_train_config(options, overrides).model.data_config.allow_external_links is False


@pytest.mark.parametrize("name", ["config.json", "vocabs/assay_vocab.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"unknown": ' + "1" * 5_000 + "}", "cannot be parsed as JSON"),
        ('{"unknown": 0, "unknown": 1}', "duplicate key 'unknown'"),
        ("\udcff", "cannot be parsed as JSON"),
        (" " * (2**26 + 1), "bytes of JSON exceed the limit of 67,108,864"),
    ],
    ids=["deep list", "deep object", "long number", "repeated key", "no UTF-8", "large"],
)
def test_invalid_json_is_refused(checkpoint_copy: Path, name: str, content: str, message: str) -> None:
    (checkpoint_copy / name).write_bytes(content.encode(errors="surrogateescape"))
    assert_refused(checkpoint_copy, rf"{Path(name).name}: .*{message}")


@pytest.mark.parametrize("number", [-1, 2**20, 2**63, 10**30])
def test_token_ids_are_limited(checkpoint_copy: Path, number: int) -> None:
    path = checkpoint_copy / "vocabs" / "assay_vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new": number}))
    assert_refused(checkpoint_copy, rf"assay_vocab\.json: token id {number} of 'new' is not between 0 and 1048575")


def test_token_ids_match_the_weights(checkpoint_copy: Path) -> None:
    path = checkpoint_copy / "vocabs" / "assay_vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new": 1000}))
    assert_refused(checkpoint_copy, r"wrong shape: aux_embeddings\.assay\.weight .* instead of \(1001, 32\)")


def set_number(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(weights: dict[str, Tensor]) -> None:
        weights[name].view(-1)[-1] = value

    return edit


def edit_weights(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = torch.load(path / "model_weights.pt", weights_only=True)
    edit(weights)
    torch.save(weights, path / "model_weights.pt")


NAMES = [
    "gene_embeddings.embedding.weight",
    "gene_embeddings.mlp.layers.0.bias",
    "transformer_encoder.encoder_layers.1.self_attn.linears.2.weight",
    "transformer_encoder.encoder_layers.0.norm1.weight",
    "aux_embeddings.assay.weight",
    "mu.gene_embedding.weight",
    "gene_id_head.layers.4.weight",
]


@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38, -3e38])
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_or_huge_weights_are_refused(checkpoint_copy: Path, name: str, value: float) -> None:
    edit_weights(checkpoint_copy, set_number(name, value))
    assert_refused(checkpoint_copy, rf"model_weights\.pt: {name} has values from ")
    assert_refused(checkpoint_copy, f"{name} has values from ", precision="bf16-mixed")
    if name == NAMES[0]:
        options = {**CPU_32, "model.model_type": "esm2ce"}
        with pytest.raises(CheckpointError, match=f"{name} has values from "):
            load_checkpoint(checkpoint_copy, load_config(checkpoint_copy, options))


def test_an_expanded_tensor_is_refused(checkpoint_copy: Path) -> None:
    edit_weights(checkpoint_copy, lambda weights: weights.update({NAMES[0]: torch.ones(1).expand(2**40, 2**20)}))
    assert_refused(checkpoint_copy, "not a state dict")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": 3}, "labels are not unique"),
        ({"column": "a/b"}, "'a/b' is not a valid column name"),
        ({"column": ""}, "is not a valid column name"),
        ({"labels": ["B", "B"]}, "labels are not unique"),
        ({"labels": ["B", 1]}, "labels are not unique"),
        ({"labels": ["B", "T", "NK"]}, "damaged"),
        ({"labels": None}, "damaged"),
        ({"weights": {}}, "damaged"),
    ],
    ids=str,
)
def test_an_invalid_label_head_is_refused(checkpoint_copy: Path, change: dict[str, object], message: str) -> None:
    content = LabelHead("cell_type", ["B", "T"], 32).to_file()
    torch.save(content, checkpoint_copy / "label_head.pt")
    load(checkpoint_copy)
    torch.save(content | change, checkpoint_copy / "label_head.pt")
    assert_refused(checkpoint_copy, rf"label_head\.pt: damaged.*{message}|label_head\.pt: {message}")


def test_a_label_head_must_match_the_embeddings_and_be_finite(checkpoint_copy: Path) -> None:
    torch.save(LabelHead("cell_type", ["B", "T"], 16).to_file(), checkpoint_copy / "label_head.pt")
    assert_refused(checkpoint_copy, r"label_head\.pt: expects embeddings of width 16, but the checkpoint's have 32")
    content = LabelHead("cell_type", ["B", "T"], 32).to_file()
    content["weights"]["linear.weight"][0, 0] = NAN
    torch.save(content, checkpoint_copy / "label_head.pt")
    assert_refused(checkpoint_copy, r"label_head\.pt: .*NaN or infinite")


@pytest.mark.parametrize(
    "override",
    [
        "model.data_config.clip_counts=1e400",
        "model.data_config.normalize_to_scale=.inf",
        "model.data_config.normalize_to_scale=nan",
        f"model.data_config.filter_outliers={'9' * 400}",
        f"model.inference_config.batch_size={10**12}",
        f"model.inference_config.tokens_per_batch={10**20}",
        f"model.inference_config.num_gpus={10**9}",
        f"model.data_config.seed={10**30}",
        f"model.data_config.block_size={10**12}",
    ],
)
def test_an_invalid_setting_is_refused(override: str) -> None:
    with pytest.raises(UsageError, match=override.partition("=")[0]) as refusal:
        load_config(CHECKPOINT, {}, [override])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "nan") for name in ("learning_rate", "weight_decay", "clip_gradients", "lora_alpha")),
        *((name, "inf") for name in ("learning_rate", "count_loss_weight", "label_loss_weight", "gene_loss_weight")),
        *((name, "nan") for name in ("warmup_share", "final_learning_rate_share", "validation_fraction")),
        ("betas", "[0.9,nan]"),
        ("data_weights", "[nan]"),
        ("data_weights", "[inf]"),
        ("max_epochs", str(10**9)),
        ("max_steps", str(10**12)),
        ("seed", str(10**30)),
        ("lora_rank", str(10**9)),
    ],
)
def test_an_invalid_training_setting_is_refused(name: str, value: str) -> None:
    options = {"training.data_files": ["x"], "training.protein_embeddings": ["y"]}
    with pytest.raises(UsageError, match=rf"training\.{name}"):
        load_train_config(options, [f"training.{name}={value}"])


def fill(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights[name].fill_(value)


OUTPUTS: dict[str, dict[str, object]] = {
    "cell": {},
    "llh": {"output_keys": ["llh"]},
    "cge": {"emb_type": "cge"},
    "pooled": {"emb_type": "cge", "cge_pool": "gene"},
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_non_finite_results_are_never_written(checkpoint_copy: Path, tmp_path: Path, output: str) -> None:
    """The weights are finite, but large enough for products to overflow."""
    for name in ("linear1", "linear2"):
        edit_weights(checkpoint_copy, fill(f"transformer_encoder.encoder_layers.1.{name}.weight", 1.7e19))
    settings = CPU_32 | {f"model.inference_config.{key}": value for key, value in OUTPUTS[output].items()}
    settings["model.inference_config.output_path"] = str(tmp_path / "results")
    config = load_config(checkpoint_copy, settings)
    message = r"of \d+ cells of a batch are NaN or infinite \(rows \d+"
    with pytest.raises(TranscriptFormerError, match=message):
        run([CELLS], checkpoint_copy, config)
    assert not list((tmp_path / "results").glob("*.h5ad"))
    with pytest.raises(TranscriptFormerError, match=message):
        embed(CELLS, load_checkpoint(checkpoint_copy, config))


def test_non_finite_rows_are_reported() -> None:
    embeddings = np.zeros((4, 3), np.float32)
    check_finite({"embeddings": embeddings}, {"embeddings": np.arange(4)})
    embeddings[1, 2], embeddings[3, 0] = np.nan, np.inf
    with pytest.raises(TranscriptFormerError, match=r"embeddings of 2 cells .* \(rows 17, 19 of the output\)"):
        check_finite({"embeddings": embeddings}, {"embeddings": np.array([16, 17, 18, 19])})
    with pytest.raises(TranscriptFormerError, match=r"embeddings of 1 cells .* \(rows 5 of"):
        check_finite({"cge_embeddings": embeddings}, {"cge_embeddings": np.array([4, 5, 5, 5])})


def test_a_cell_without_genes_has_a_missing_likelihood() -> None:
    config = load_config(CHECKPOINT, CPU_32 | {"model.inference_config.output_keys": ["embeddings", "llh"]})
    cells = random_adata(3)
    cells.X = cells.X.multiply([[1], [0], [1]]).tocsr()
    assert embed(cells, load_checkpoint(CHECKPOINT, config)).uns["llh"]["llh"].isna().tolist() == [False, True, False]


def test_column_names_that_clash_with_pytorch_are_refused(checkpoint_copy: Path) -> None:
    shutil.copy(checkpoint_copy / "vocabs" / "assay_vocab.json", checkpoint_copy / "vocabs" / "keys_vocab.json")
    edit_config(checkpoint_copy, "data_config", aux_cols=["keys"])
    with pytest.raises(TranscriptFormerError, match=r"aux_cols: 'keys'"):
        load(checkpoint_copy)
