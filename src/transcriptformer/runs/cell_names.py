"""Cell names made unique, for results of any size."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from transcriptformer.data.store import Location


class UniqueNames:
    """Appends a running number to the names that occur in earlier cells.

    Keeps a hash and two numbers per cell instead of the names. Names with equal hashes count as equal.

    Parameters
    ----------
    blocks
        Names of all cells, in order.
    """

    def __init__(self, blocks: Iterable[np.ndarray]) -> None:
        hashes = np.concatenate([pd.util.hash_array(names) for names in blocks])
        order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[order]
        is_first = np.append(True, self.hashes[1:] != self.hashes[:-1])
        starts, group = np.flatnonzero(is_first), np.cumsum(is_first) - 1
        self.numbers, self.group_sizes = np.empty(len(hashes), np.int32), np.empty(len(hashes), np.int32)
        self.numbers[order] = np.arange(len(hashes)) - starts[group]  # earlier cells of the same name
        self.group_sizes[order] = np.diff(np.append(starts, len(hashes)))[group]

    def rename(self, names: np.ndarray, start: int) -> np.ndarray:
        """Return unique names of the cells from `start` on, whose names these are (cells,)."""
        here = slice(start, start + len(names))
        numbers, renamed = self.numbers[here].copy(), names.copy()
        pending = np.flatnonzero(numbers)
        while len(pending):
            renamed[pending] = [f"{names[i]}-{numbers[i]}" for i in pending]
            pending = pending[self._exist(renamed[pending])]
            numbers[pending] += self.group_sizes[here][pending]  # numbers that no other cell of the name has
        return renamed

    def _exist(self, names: np.ndarray) -> np.ndarray:
        """Mask of the names (cells,) that some cell has."""
        hashes = pd.util.hash_array(names)
        places = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        return self.hashes[places] == hashes


def stems_of(sources: Sequence[Location | anndata.AnnData]) -> list[str | None]:
    """Return the name of each file or store without folder and suffix; None for an AnnData.

    Where names repeat, as in sample_1/counts.h5 and sample_2/counts.h5, folders come first: sample_1_counts.
    """
    paths = [() if isinstance(source, anndata.AnnData) else _parts_without_suffix(source) for source in sources]
    n_parts = [1] * len(paths)
    while True:
        stems = ["_".join(parts[-n:]) for parts, n in zip(paths, n_parts, strict=True)]
        n_inputs = Counter(stems)
        longer = [
            n + 1 if n_inputs[stem] > 1 and n < len(parts) else n
            for stem, parts, n in zip(stems, paths, n_parts, strict=True)
        ]
        if longer == n_parts:
            return [stem or None for stem in stems]
        n_parts = longer


def _parts_without_suffix(source: Location) -> tuple[str, ...]:
    path = Path(str(source).partition("?")[0].removesuffix(".gz"))
    # Paths may contain invalid Unicode, which HDF5 cannot store.
    return tuple(part.strip("/").encode(errors="replace").decode() for part in (*path.parts[:-1], path.stem))


def with_stem(names: pd.Index, stem: str | None) -> np.ndarray:
    """Append the stem of a file to the names of its cells (cells,)."""
    texts = names.astype(object).to_numpy()
    return texts.copy() if stem is None else np.array([f"{name}-{stem}" for name in texts], object)
