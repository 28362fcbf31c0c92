"""Contextual gene embeddings pooled as they come: a mean vector and a count per gene, or per gene and group."""

import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from transcriptformer.errors import DamagedError, OutputError
from transcriptformer.inference.output import GENE_COLUMN, N_CELLS_COLUMN
from transcriptformer.storage.results import RUN, SECONDS_AT_RISK, cannot_keep, drop, open_of_run
from transcriptformer.storage.sealed import SealedFile, write_sealed

NO_GROUP = -1
"""Cells of this group are left out."""


class Pool:
    """Sums of vectors in float64, and how many there were, for every gene and group that occurs.

    Parameters
    ----------
    group_of_row
        Group of each kept cell (cells,), from 0, or `NO_GROUP`.
    n_tokens
        Size of the gene vocabulary.
    width
        Of a vector, D.
    """

    def __init__(self, group_of_row: np.ndarray, n_tokens: int, width: int) -> None:
        self.group_of_row, self.n_tokens = group_of_row, n_tokens
        self.slots: dict[int, int] = {}
        self.sums = np.zeros((0, width), np.float64)
        self.counts = np.zeros(0, np.int64)

    @property
    def keys(self) -> np.ndarray:
        """Group × vocabulary size + gene token, for each sum."""
        return np.fromiter(self.slots, np.int64, len(self.slots))

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Take the results of a batch, by name of the field."""
        group = np.repeat(self.group_of_row[values["rows"]].astype(np.int64), values["n_genes"])
        keys = group * self.n_tokens + values["genes"]
        grouped = np.flatnonzero(group != NO_GROUP)
        order = grouped[np.argsort(keys[grouped], kind="stable")]
        distinct, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
        if len(distinct):
            sums = np.add.reduceat(values["cge_embeddings"][order], starts, axis=0, dtype=np.float64)
            self.add_sums(distinct, sums, counts)

    def flush(self) -> None:
        """Nothing waits."""

    def add_sums(self, keys: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
        """Take what has been summed elsewhere, each key once."""
        n_slots = len(self.slots) + sum(key not in self.slots for key in keys.tolist())
        if n_slots > len(self.counts):  # first, for memory may not suffice
            room = max(n_slots, 3 * len(self.counts) // 2)
            self.sums = np.concatenate([self.sums, np.zeros((room - len(self.sums), self.sums.shape[1]))])
            self.counts = np.concatenate([self.counts, np.zeros(room - len(self.counts), np.int64)])
        slots = np.array([self.slots.setdefault(key, len(self.slots)) for key in keys.tolist()], np.int64)
        self.sums[slots] += sums
        self.counts[slots] += counts

    def table(self, gene_names: np.ndarray, groups: pd.Index, column: str | None) -> tuple[pd.DataFrame, np.ndarray]:
        """Genes, groups and numbers of cells, and the mean vectors (sums, D), float32, in the order of the vocabulary.

        Parameters
        ----------
        gene_names
            Name of each gene token (tokens,).
        groups
            Name of each group.
        column
            What the groups are called; None: there is only one.
        """
        keys = self.keys
        group, gene = np.divmod(keys, self.n_tokens)
        order = np.lexsort((group, gene))
        means = np.empty((len(keys), self.sums.shape[1]), np.float32)
        for start in range(0, len(keys), 1024):  # in blocks, for the sums may take half of the memory
            here = order[start : start + 1024]
            means[start : start + 1024] = self.sums[here] / self.counts[here, None]
        table = pool_obs(gene_names[gene[order]], group[order], groups, column)
        table[N_CELLS_COLUMN] = self.counts[order]
        return table, means


def pool_obs(genes: np.ndarray, group: np.ndarray, groups: pd.Index, column: str | None) -> pd.DataFrame:
    """What the rows of a pool are of, named `gene` or `gene | group`.

    Parameters
    ----------
    genes
        Name of each row's gene (rows,), or one for all.
    group
        Number of each row's group (rows,).
    groups, column
        As for `Pool.table`.
    """
    names = np.broadcast_to(genes.astype(str), group.shape)
    index = names if column is None else names + " | " + groups[group].astype(str).to_numpy().astype(str)
    table = pd.DataFrame({GENE_COLUMN: names}, index=index)
    if column is not None:
        table[column] = pd.Categorical.from_codes(group, groups)
    return table


POOLS = "pool-*.safetensors"
"""Names of the files that pools are kept in."""


class PoolWriter:
    """A pool that is saved, with the rows it has taken, every now and then: one sealed file, replaced as a whole.

    Parameters
    ----------
    folder
        Where it is saved; it exists.
    process
        Number of the process.
    pool
        Where the results go.
    run
        The run that they belong to.
    """

    def __init__(self, folder: Path, process: int, pool: Pool, run: str) -> None:
        self.path, self.run = folder / f"pool-{process:05}-{secrets.token_hex(4)}.safetensors", run
        self.pool, self.rows = pool, np.zeros(len(pool.group_of_row), bool)
        self.last_saved, self.seconds_to_save, self.n_unsaved = time.monotonic(), 0.0, 0
        self.failure: Exception | None = None

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Take the results of a batch; saving takes at most about a twentieth of the time.

        Raises
        ------
        OutputError
            If the pool cannot be saved, now or earlier.
        """
        if self.failure is not None:
            raise self.failure
        try:
            self.pool.add(values)
        except Exception as error:  # such as a lack of memory, which leaves a part of them added
            self.failure = error
            raise
        self.rows[values["rows"]] = True
        self.n_unsaved += len(values["rows"])
        if time.monotonic() - self.last_saved > max(SECONDS_AT_RISK, 20 * self.seconds_to_save):
            self.flush()

    def flush(self) -> None:
        """Save, safely on disk.

        Raises
        ------
        OutputError
            If the pool cannot be saved, now or earlier; what was saved before stays.
        """
        if self.failure is not None:
            raise self.failure
        if self.n_unsaved:
            started, n = time.monotonic(), len(self.pool.slots)
            try:
                arrays = {
                    "rows": np.packbits(self.rows),
                    "keys": self.pool.keys,
                    "sums": self.pool.sums[:n],
                    "counts": self.pool.counts[:n],
                }
                write_sealed(self.path, arrays, {RUN: self.run})
            except OutputError as error:
                self.failure = cannot_keep(self.path.parent, error)
                raise self.failure from error
            except Exception as error:  # such as a lack of memory
                self.failure = error
                raise
            self.n_unsaved, self.seconds_to_save = 0, time.monotonic() - started
        self.last_saved = time.monotonic()


def rows_saved(folder: Path, n_rows: int) -> np.ndarray:
    """Mask (n_rows,) of the rows in saved pools, unverified: enough to count them."""
    done = np.zeros(n_rows, bool)
    for path in folder.glob(POOLS):
        done |= np.unpackbits(SealedFile(path).read("rows"), count=n_rows).astype(bool)
    return done


def rows_pooled(folder: Path, run: str, n_rows: int) -> np.ndarray:
    """Mask (n_rows,) of the rows in the saved pools of a run that can be used."""
    done = np.zeros(n_rows, bool)
    for _ in _usable_pools(folder, run, done):
        pass
    return done


def read_pools(folder: Path, run: str, pool: Pool) -> np.ndarray:
    """Add the saved pools of a run to `pool`; the mask of the rows that it has taken."""
    done = np.zeros(len(pool.group_of_row), bool)
    for saved in _usable_pools(folder, run, done):
        pool.add_sums(saved["keys"], saved["sums"], saved["counts"])
    return done


def _usable_pools(folder: Path, run: str, done: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Saved pools, whose rows are noted in `done` (rows,); unusable ones are told of and deleted, if they can be.

    A process that outlives its run may save a pool at any time, with rows that another process has computed again.
    """
    for path in sorted(folder.glob(POOLS)):
        try:
            saved = open_of_run(path, run).read_verified()
        except DamagedError as error:
            drop(path, str(error))
            continue
        rows = np.unpackbits(saved["rows"], count=len(done)).astype(bool)
        if (done & rows).any():
            drop(path, f"{path}: holds cells that another file holds too")
            continue
        done |= rows
        yield saved
