"""Small training runs for tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import random_adata
from transcriptformer.training.config import TrainConfig, load_train_config
from transcriptformer.training.metrics import read_metrics

GENE_FILE = CHECKPOINT / "vocabs" / "homo_sapiens_gene.h5"

SMALL: dict[str, object] = {
    **{f"model.model_config.{name}": 16 for name in ("embed_dim", "model_dim", "gene_head_hidden_dim")},
    **{"model.model_config.num_layers": 2, "model.model_config.num_heads": 2, "model.model_config.seq_len": 64},
    **{"training.streams": 4, "training.block_size": 4, "training.blocks_to_mix": 2, "training.batch_size": 8},
    **{"training.precision": "32", "training.device": "cpu", "training.log_every": 1, "training.max_epochs": 2},
    "training.learning_rate": 0.003,
}
"""Settings of a model that trains in seconds."""


def write_cells(path: Path, n_cells: int = 40, seed: int = 0, **obs: Any) -> Path:
    """Write random cells with these metadata columns besides the assay."""
    adata = random_adata(n_cells, n_genes=60, seed=seed)
    adata.obs = adata.obs.assign(**obs)
    adata.strings_to_categoricals()
    adata.write_h5ad(path)
    return path


def write_recipe(path: Path) -> Path:
    """Write `SMALL` as a recipe for `--config`."""
    recipe = OmegaConf.create()
    for key, value in SMALL.items():
        OmegaConf.update(recipe, key, value)
    OmegaConf.save(recipe, path)
    return path


def config_of(folder: Path, *files: Path, start: Path | None = None, **training: Any) -> TrainConfig:
    """Configure a run with output `folder`, from scratch or from checkpoint `start`; double underscores are dots."""
    options: dict[str, object] = {
        "training.data_files": [str(file) for file in files],
        "training.output_path": str(folder),
        **({"training.protein_embeddings": [str(GENE_FILE)]} if start is None else {}),
        **({key: value for key, value in SMALL.items() if start is None or key.startswith("training.")}),
    }
    if start is not None:
        options["training.checkpoint_path"] = str(start)
    for name, value in training.items():
        options[name.replace("__", ".") if "__" in name else f"training.{name}"] = value
    return load_train_config(options)


def losses(folder: Path) -> np.ndarray:
    """Read metrics.csv without the seconds as an array (lines, columns), with NaN for missing values."""
    rows = read_metrics(folder / "metrics.csv")
    return np.array([[float(v or "nan") for k, v in row.items() if k != "seconds"] for row in rows])


def assert_same_run(folder: Path, expected: Path) -> None:
    """Check that two runs have the same steps over the same genes, and the same losses and weights.

    Values agree up to float32 precision, because rounding in matrix products depends on memory alignment.
    """
    steps, wanted = (
        [(row["step"], row["genes"], row["learning_rate"]) for row in read_metrics(run / "metrics.csv")]
        for run in (folder, expected)
    )
    assert steps == wanted
    np.testing.assert_allclose(losses(folder), losses(expected), rtol=1e-5)
    ours, theirs = weights(folder), weights(expected)
    assert ours.keys() == theirs.keys()
    joined = (torch.cat([run[name].ravel() for name in theirs]) for run in (ours, theirs))
    a, b = joined
    assert float((a - b).norm() / b.norm()) < 1e-5


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Load the weights of the trained checkpoint."""
    return torch.load(folder / "checkpoint" / "model_weights.pt", weights_only=True)
