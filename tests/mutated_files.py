"""Files with seeded random damage: flipped bytes, truncation, zeroed ranges, swapped blocks."""

import shutil
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from tests.h5ad_files import random_adata

N_CELLS, N_GENES = 24, 60


def the_cells() -> anndata.AnnData:
    """Return cells with all kinds of metadata columns."""
    adata = random_adata(N_CELLS, n_genes=N_GENES)
    numbers = np.arange(N_CELLS)
    adata.obs["assay"] = pd.Categorical(np.where(numbers % 2, "10x multiome", "Smart-seq2"))
    adata.obs["donor"] = [f"donor {number % 5}" for number in numbers]
    adata.obs["score"] = numbers / 7
    adata.obs["n_counts"] = pd.array([None, *range(N_CELLS - 1)], dtype="Int64")
    adata.obs["is_doublet"] = numbers % 3 == 0
    return adata


def _write_h5ad(path: Path) -> None:
    the_cells().write_h5ad(path)


def _write_dense(path: Path) -> None:
    adata = the_cells()
    adata.X = adata.X.toarray()
    adata.write_h5ad(path)


def _write_gzip(path: Path) -> None:
    the_cells().write_h5ad(path, compression="gzip")


def _write_zarr(path: Path, zarr_format: int) -> None:
    with anndata.settings.override(zarr_write_format=zarr_format):
        the_cells().write_zarr(path)


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "csr.h5ad": _write_h5ad,
    "dense.h5ad": _write_dense,
    "gzip.h5ad": _write_gzip,
    "v2.zarr": lambda path: _write_zarr(path, 2),
    "v3.zarr": lambda path: _write_zarr(path, 3),
}


def flip_bytes(content: bytearray, rng: np.random.Generator) -> None:
    for place in rng.integers(len(content), size=rng.integers(1, 9)):
        content[place] ^= rng.integers(1, 256)


def truncate(content: bytearray, rng: np.random.Generator) -> None:
    del content[rng.integers(len(content)) :]


def zero_range(content: bytearray, rng: np.random.Generator) -> None:
    length = min(int(rng.integers(1, 512)), len(content))
    start = rng.integers(len(content) - length + 1)
    content[start : start + length] = bytes(length)


def swap_blocks(content: bytearray, rng: np.random.Generator) -> None:
    length = min(int(rng.integers(1, 256)), len(content) // 2)
    first = int(rng.integers(len(content) - 2 * length + 1))
    second = int(rng.integers(first + length, len(content) - length + 1))
    here, there = slice(first, first + length), slice(second, second + length)
    content[here], content[there] = content[there], content[here]


KINDS = (flip_bytes, truncate, zero_range, swap_blocks)


def mutate(source: Path, target: Path, seed: int) -> str:
    """Copy a file or store, damage the copy, and return a description of the damage."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    files = [target] if target.is_file() else sorted(path for path in target.rglob("*") if path.is_file())
    damaged = files[rng.integers(len(files))]
    content = bytearray(damaged.read_bytes())
    if content:
        kind(content, rng)
    damaged.write_bytes(content)
    return f"{kind.__name__} in {damaged.relative_to(target.parent)}"
