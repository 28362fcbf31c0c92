"""Golden cases: results of the published package, with the settings that reproduce them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from transcriptformer.checkpoint.published import load_config
from transcriptformer.config import Config

SYNTHETIC = Path(__file__).parent / "golden"
REAL = Path(__file__).parents[2] / "shared" / "golden"
CHECKPOINT = SYNTHETIC / "checkpoint"
CELLS = SYNTHETIC / "cells.h5ad"

TOLERANCE = 1e-5


@dataclass(frozen=True)
class GoldenCase:
    """Expected results of one `expected/*.npz`, with the checkpoint and the data they were computed from."""

    name: str
    checkpoint: Path
    data: Path
    n_cells: int
    settings: tuple[str, ...]
    new_species: Path | None
    stale_indices: bool
    expected: dict[str, np.ndarray]

    def __str__(self) -> str:
        return self.name

    def config(self, *overrides: str) -> Config:
        settings = [s if s.startswith("model.") else f"model.inference_config.{s}" for s in self.settings]
        options: dict[str, object] = {
            "model.inference_config.precision": "32",
            "model.inference_config.device": "cpu",
            "model.inference_config.output_keys": ["embeddings", "llh"] if "llh" in self.expected else ["embeddings"],
            "model.inference_config.pretrained_embedding": [str(self.new_species)] if self.new_species else None,
            "model.inference_config.reference_stale_indices": self.stale_indices,
        }
        return load_config(self.checkpoint, options, [*settings, *overrides])

    def source(self) -> Path | anndata.AnnData:
        return anndata.read_h5ad(self.data)[: self.n_cells].copy() if self.n_cells else self.data


def synthetic_cases(*names: str) -> list[GoldenCase]:
    """Return cases of the suite in this repository."""
    return _cases(SYNTHETIC, "synthetic", names)


def real_cases(*names: str) -> list[Any]:
    """Return cases with real cells, stored next to the checkout; a single skipped case if they are absent."""
    cases = _cases(REAL, "real", names) if REAL.is_dir() else []
    absent = pytest.param(None, marks=pytest.mark.skip(reason=f"no real cells in {REAL}"))
    return cases or [absent]


def _cases(root: Path, label: str, names: Sequence[str]) -> list[GoldenCase]:
    checkpoints, data = (root / "checkpoints", root / "data") if (root / "data").is_dir() else (root, root)
    cases = []
    for name in names:
        path = root / "expected" / f"{name}.npz"
        arrays = dict(np.load(path))
        case = json.loads(str(arrays.pop("case")))
        cases.append(
            GoldenCase(
                name=f"{label}-{name}",
                checkpoint=checkpoints / case["checkpoint"],
                data=data / case["data"],
                n_cells=case["cells"],
                settings=tuple(case["set"]),
                new_species=checkpoints / case["ood"] if case["ood"] else None,
                stale_indices=case["reference_stale_indices"],
                expected=arrays,
            )
        )
    return cases


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return ‖a−b‖/‖b‖ over the non-NaN entries; NaNs must be in the same places."""
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    a, b = np.nan_to_num(actual.astype(np.float64)), np.nan_to_num(expected.astype(np.float64))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
