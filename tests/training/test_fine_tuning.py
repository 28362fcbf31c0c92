"""Training from a checkpoint: frozen and new parameters, labels, and use of the result."""

import json
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import make_adata
from tests.training.training_runs import config_of, weights, write_cells
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.checkpoint.vocabs import read_gene_ids
from transcriptformer.demo.run import CHECKPOINT as DEMO
from transcriptformer.errors import CheckpointError, DataError, UsageError
from transcriptformer.inference.run import embed, run
from transcriptformer.runs.output import read_provenance
from transcriptformer.training.run import fit

TYPES = np.array(["B", "T", "NK"])[np.arange(40) % 3]


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Cells whose type can be predicted from some of their genes."""
    path = write_cells(tmp_path / "cells.h5ad", cell_type=TYPES)
    adata = anndata.read_h5ad(path)
    counts = adata.X.toarray()
    for i, cell_type in enumerate(("B", "T", "NK")):
        counts[cell_type == TYPES, 10 * i : 10 * i + 10] += 25
    adata.X = type(adata.X)(counts)
    adata.write_h5ad(path)
    return path


def trained_weights() -> dict[str, torch.Tensor]:
    return torch.load(CHECKPOINT / "model_weights.pt", weights_only=True)


def test_all_weights_change_but_protein_embeddings(cells: Path, tmp_path: Path) -> None:
    fit(config_of(tmp_path / "run", cells, start=CHECKPOINT, max_epochs=1))
    before, after = trained_weights(), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    protein = "gene_embeddings.embedding.weight"
    assert torch.equal(before[protein], after[protein])
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert set(before) - set(moved) == {protein}
    assert all((before[name] - after[name]).abs().max() < 0.2 for name in moved)


def test_the_demo_checkpoint_can_be_fine_tuned(tmp_path: Path) -> None:
    """It has no metadata columns, and protein embeddings of another width."""
    genes = read_gene_ids(DEMO / "vocabs" / "pbmc_coexpression.h5")
    counts = np.random.default_rng(0).poisson(0.3, (60, len(genes)))
    make_adata(counts, genes).write_h5ad(tmp_path / "cells.h5ad")
    trained = fit(config_of(tmp_path / "run", tmp_path / "cells.h5ad", start=DEMO, max_steps=3, batch_size=4))
    assert trained is not None
    before, after = torch.load(DEMO / "model_weights.pt", weights_only=True), weights(tmp_path / "run")
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(before) - {
        "gene_embeddings.embedding.weight"
    }
    configs = [json.loads((folder / "config.json").read_text())["model"] for folder in (DEMO, trained.checkpoint)]
    assert configs[0]["model_config"] == configs[1]["model_config"]
    result = embed([tmp_path / "cells.h5ad"], load_checkpoint(trained.checkpoint, load_config(trained.checkpoint)))
    assert result.obsm["embeddings"].shape == (60, 96)


def test_named_modules_stay_frozen(cells: Path, tmp_path: Path) -> None:
    names = ["transformer_encoder.encoder_layers.0", "mu"]
    fit(config_of(tmp_path / "run", cells, start=CHECKPOINT, max_epochs=1, freeze=names))
    before, after = trained_weights(), weights(tmp_path / "run")
    for name, weight in before.items():
        is_frozen = name.startswith((*(f"{frozen}." for frozen in names), "gene_embeddings.embedding"))
        assert torch.equal(weight, after[name]) == is_frozen, name


def test_freezing_an_unknown_module_is_refused(cells: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--freeze transformer_encoder\.encoder_layers\.9: no such module; did you mean"
    ):
        fit(config_of(tmp_path / "run", cells, start=CHECKPOINT, freeze=["transformer_encoder.encoder_layers.9"]))


def test_lora_changes_adapted_weights_only_and_keeps_the_published_names(cells: Path, tmp_path: Path) -> None:
    fit(config_of(tmp_path / "run", cells, start=CHECKPOINT, max_epochs=1, lora_rank=2))
    before, after = trained_weights(), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".linears." in name or ".linear1." in name or ".linear2." in name}
    load_checkpoint(tmp_path / "run" / "checkpoint", load_config(tmp_path / "run" / "checkpoint"))


def test_new_assays_start_from_a_known_one_or_the_mean(tmp_path: Path) -> None:
    cells = write_cells(tmp_path / "cells.h5ad", assay="brand-new")
    known = json.loads((CHECKPOINT / "vocabs" / "assay_vocab.json").read_text())
    like = next(name for name in known if name != "unknown")
    new = {"assay": {"brand-new": like, "other": "mean"}}
    frozen = ["aux_embeddings"]  # to compare the initial values
    fit(config_of(tmp_path / "run", cells, start=CHECKPOINT, max_epochs=1, new_aux_values=new, freeze=frozen))
    vocab = json.loads((tmp_path / "run" / "checkpoint" / "vocabs" / "assay_vocab.json").read_text())
    assert vocab == {**known, "brand-new": len(known), "other": len(known) + 1}
    rows = weights(tmp_path / "run")["aux_embeddings.assay.weight"]
    before = trained_weights()["aux_embeddings.assay.weight"]
    torch.testing.assert_close(rows[: len(known)], before)
    torch.testing.assert_close(rows[len(known)], before[known[like]])
    others = [i for name, i in known.items() if name != "unknown"]
    torch.testing.assert_close(rows[len(known) + 1], before[others].mean(0))


def test_new_assays_are_learned_with_lora(tmp_path: Path) -> None:
    cells = write_cells(tmp_path / "cells.h5ad", assay="brand-new")
    new = {"assay": {"brand-new": "mean"}}
    fit(config_of(tmp_path / "run", cells, start=CHECKPOINT, max_epochs=1, new_aux_values=new, lora_rank=1))
    rows, before = (
        weights(tmp_path / "run")["aux_embeddings.assay.weight"],
        trained_weights()["aux_embeddings.assay.weight"],
    )
    assert not torch.allclose(rows[-1], before[1:].mean(0))
    torch.testing.assert_close(rows[:-1], before, rtol=0.01, atol=1e-4)  # neither gradients nor weight decay


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"assay": {"unknown": "mean"}}, "--new-assay unknown: already in the checkpoint's vocabulary of assay"),
        (
            {"assay": {"x": "10x multiom"}},
            "'10x multiom' is not in the checkpoint's vocabulary of assay; did you mean '10x multiome'",
        ),
        ({"tissue": {"x": "mean"}}, r"the checkpoint has no vocabulary for tissue; it has assay"),
    ],
)
def test_invalid_new_values_are_refused(
    cells: Path, tmp_path: Path, new: dict[str, dict[str, str]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        fit(config_of(tmp_path / "run", cells, start=CHECKPOINT, new_aux_values=new))


@pytest.mark.slow
def test_labels_are_learned_and_predicted_at_inference(cells: Path, tmp_path: Path) -> None:
    """In memory and through a file, with probabilities, and only if requested."""
    settings = {"gene_loss_weight": 0.0, "count_loss_weight": 0.0, "max_epochs": 50, "learning_rate": 0.01}
    trained = fit(config_of(tmp_path / "run", cells, start=CHECKPOINT, label_column="cell_type", **settings))
    assert trained is not None
    assert trained.validation["validation_label_accuracy"] == 1
    options = {"model.inference_config.precision": "32", "model.inference_config.device": "cpu"}
    config = load_config(trained.checkpoint, {**options, "model.inference_config.output_path": str(tmp_path / "out")})
    result = embed([cells], load_checkpoint(trained.checkpoint, config))
    assert (result.obs["predicted_cell_type"].astype(str).to_numpy() == TYPES).mean() > 0.9
    assert list(result.obs["predicted_cell_type"].cat.categories) == ["B", "NK", "T"]
    assert result.obs["predicted_cell_type_probability"].between(1 / 3, 1).all()
    written = run([cells], trained.checkpoint, config)
    assert written is not None
    assert read_provenance(written) is not None

    from_file = anndata.read_h5ad(written).obs
    assert list(from_file["predicted_cell_type"]) == list(result.obs["predicted_cell_type"])
    without_labels = load_config(trained.checkpoint, {**options, "model.inference_config.predict_labels": False})
    assert "predicted_cell_type" not in embed([cells], load_checkpoint(trained.checkpoint, without_labels)).obs


def test_heads_without_a_loss_do_not_change(cells: Path, tmp_path: Path) -> None:
    settings = {"gene_loss_weight": 0.0, "count_loss_weight": 0.0, "max_epochs": 1, "label_column": "cell_type"}
    fit(config_of(tmp_path / "run", cells, start=CHECKPOINT, **settings))
    before, after = trained_weights(), weights(tmp_path / "run")
    for name in before:
        if name.startswith(("mu.", "gene_id_head.")):
            assert torch.equal(before[name], after[name])


def test_a_label_head_is_fine_tuned(cells: Path, tmp_path: Path) -> None:
    first = fit(config_of(tmp_path / "first", cells, start=CHECKPOINT, label_column="cell_type", max_epochs=1))
    assert first is not None
    fit(config_of(tmp_path / "more", cells, start=first.checkpoint, label_column="cell_type", max_epochs=1))
    heads = [
        torch.load(tmp_path / run / "checkpoint" / "label_head.pt", weights_only=True) for run in ("first", "more")
    ]
    assert heads[0]["labels"] == heads[1]["labels"]
    difference = (heads[0]["weights"]["linear.weight"] - heads[1]["weights"]["linear.weight"]).abs().max()
    assert 0 < difference < 0.1


def test_a_missing_or_constant_label_column_is_refused(cells: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--label-column tissue: .*cells\.h5ad has no such obs column; it has: assay"):
        fit(config_of(tmp_path / "run", cells, start=CHECKPOINT, label_column="tissue"))
    with pytest.raises(DataError, match="--label-column assay: 1 distinct values; choose a column with 2 to 10000"):
        fit(config_of(tmp_path / "run", cells, start=CHECKPOINT, label_column="assay"))


def test_labels_unknown_to_the_checkpoint_are_refused(cells: Path, tmp_path: Path) -> None:
    first = fit(config_of(tmp_path / "first", cells, start=CHECKPOINT, label_column="cell_type", max_epochs=1))
    assert first is not None
    others = write_cells(tmp_path / "others.h5ad", cell_type=np.array(["x", "y"])[np.arange(40) % 2])
    with pytest.raises(DataError, match=r"none of the values x, y, … is a label of the checkpoint's head \(B, NK, T"):
        fit(config_of(tmp_path / "more", others, start=first.checkpoint, label_column="cell_type"))


def test_a_damaged_label_head_is_refused(cells: Path, tmp_path: Path, checkpoint_copy: Path) -> None:
    (checkpoint_copy / "label_head.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"label_head\.pt: damaged"):
        load_checkpoint(checkpoint_copy, load_config(checkpoint_copy))
