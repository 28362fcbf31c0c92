"""Loaded checkpoints for tests of the generative model."""

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from scipy import sparse

from tests.golden_cases import CHECKPOINT
from transcriptformer.checkpoint.load import Checkpoint, load_checkpoint
from transcriptformer.checkpoint.published import load_config


def load(path: Path = CHECKPOINT, /, **settings: Any) -> Checkpoint:
    """Load a checkpoint for the CPU in float32, with settings of `model.data_config` or `model.inference_config`."""
    options: dict[str, object] = {
        "model.inference_config.device": "cpu",
        "model.inference_config.precision": "32",
        **{name if name.startswith("model.") else f"model.data_config.{name}": v for name, v in settings.items()},
    }
    return load_checkpoint(path, load_config(path, options))


def without_gene_head(path: Path) -> Path:
    """Remove the gene head of a checkpoint folder."""
    config = json.loads((path / "config.json").read_text())
    config["model"]["loss_config"]["gene_id_loss_weight"] = 0.0
    (path / "config.json").write_text(json.dumps(config))
    weights = torch.load(path / "model_weights.pt", weights_only=True)
    kept = {name: value for name, value in weights.items() if not name.startswith("gene_id_head")}
    torch.save(kept, path / "model_weights.pt")
    return path


def some_cells(model: Checkpoint, n_genes: list[int]) -> anndata.AnnData:
    """Cells with random genes of the vocabulary, in its order."""
    random, names = np.random.default_rng(0), list(model.gene_vocab.genes)
    counts = np.zeros((len(n_genes), len(names)), np.float32)
    for row, n in zip(counts, n_genes, strict=True):
        row[random.choice(len(names), n, replace=False)] = random.integers(1, 40, n)
    cells = anndata.AnnData(sparse.csr_matrix(counts))
    cells.var_names = names
    return cells
