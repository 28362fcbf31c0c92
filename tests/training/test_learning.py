"""Training memorizes real cells, and predicts held-out cells better than the frequency baseline."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.golden_cases import REAL
from transcriptformer.demo.cells import HELD_OUT, coexpression_features, load_cells, write_gene_features
from transcriptformer.model.losses import zero_truncated_poisson_nll
from transcriptformer.training.config import load_train_config
from transcriptformer.training.run import Trained, fit

pytestmark = pytest.mark.slow

N_POSITIONS = 64


def train(folder: Path, file: Path, gene_file: Path, model: dict[str, Any], **training: Any) -> Trained:
    options: dict[str, object] = {
        "training.data_files": [str(file)],
        "training.protein_embeddings": [str(gene_file)],
        "training.output_path": str(folder),
        "training.precision": "32",
        "training.device": "cpu",
        "training.streams": 1,
        **{f"model.model_config.{name}": value for name, value in model.items()},
        **{name.replace("__", ".") if "__" in name else f"training.{name}": value for name, value in training.items()},
    }
    trained = fit(load_train_config(options))
    assert trained is not None
    return trained


def test_32_real_cells_are_memorized(tmp_path: Path) -> None:
    """With the genes in file order, only the choice of the cell is unpredictable, ln 32 nats per cell, and the spread
    of counts around their mean, which the model can learn: it is the count itself."""
    cells = load_cells()
    cells = cells[~cells.obs[HELD_OUT]][:32].copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    write_gene_features(tmp_path / "genes.h5", cells.var_names, coexpression_features(cells))
    model = {"embed_dim": 64, "model_dim": 64, "gene_head_hidden_dim": 64, "num_layers": 2, "num_heads": 4}
    trained = train(
        tmp_path / "run",
        tmp_path / "cells.h5ad",
        tmp_path / "genes.h5",
        {**model, "seq_len": N_POSITIONS, "dropout": 0.0},
        validation_files=[str(_copy_of(tmp_path / "cells.h5ad"))],
        batch_size=32,
        max_epochs=400,
        validate_every=50,
        learning_rate=5e-3,
        weight_decay=0.0,
        model__data_config__gene_col_name="index",
        model__data_config__aux_cols=[],
        model__data_config__randomize_genes=False,
    )
    counts = [row.data[:N_POSITIONS] for row in cells.X]
    seen = torch.from_numpy(np.minimum(np.concatenate(counts), 30))
    floor = float(zero_truncated_poisson_nll(seen, seen, 1e-6, 30, softplus_approx=True).mean())
    assert trained.validation["validation_gene_nll"] < np.log(32) / N_POSITIONS + 0.1
    assert trained.validation["validation_count_nll"] < floor + 0.1
    assert trained.baseline is not None
    assert trained.baseline > 5


def _copy_of(file: Path) -> Path:
    copy = file.with_name("copy.h5ad")
    copy.write_bytes(file.read_bytes())
    return copy


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real cells in {REAL}")
def test_held_out_heart_cells_are_predicted_better_than_by_frequency(tmp_path: Path) -> None:
    """80 training and 20 validation cells; with the genes in file order, each one constrains the next."""
    trained = train(
        tmp_path / "run",
        REAL / "data" / "human_heart_100.h5ad",
        REAL / "checkpoints" / "tiny" / "vocabs" / "homo_sapiens_gene.h5",
        {
            "embed_dim": 128,
            "model_dim": 128,
            "gene_head_hidden_dim": 128,
            "num_layers": 2,
            "num_heads": 4,
            "seq_len": 511,
        },
        validation_fraction=0.2,
        batch_size=8,
        max_epochs=12,
        learning_rate=3e-3,
        model__data_config__randomize_genes=False,
    )
    assert trained.baseline is not None
    assert trained.baseline_parts is not None
    assert trained.validation["validation_gene_nll"] < trained.baseline_parts.gene_nll - 2
    assert trained.validation["validation_loss"] < trained.baseline - 2
