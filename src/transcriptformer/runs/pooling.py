"""Incremental pooling of vectors of genes: mean and count per gene, or per gene and group."""

import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from transcriptformer.errors import DamagedError, OutputError
from transcriptformer.runs.output import GENE_COLUMN, N_CELLS_COLUMN
from transcriptformer.runs.task import Task
from transcriptformer.storage.results import FLUSH_SECONDS, RUN, cannot_write_results, discard, open_for_run
from transcriptformer.storage.sealed import SealedFile, write_sealed

NO_GROUP = -1
"""Group of cells to exclude."""


class Pool:
    """Float64 sums and counts of vectors, for each gene and group that occurs.

    Parameters
    ----------
    group_of_row
        Group of each kept cell (cells,), from 0, or `NO_GROUP`.
    n_tokens
        Size of the gene vocabulary.
    width
        Width of the vectors, D.
    field
        Name of their field.
    """

    def __init__(self, group_of_row: np.ndarray, n_tokens: int, width: int, field: str) -> None:
        self.group_of_row, self.n_tokens, self.field = group_of_row, n_tokens, field
        self.slots: dict[int, int] = {}
        self.sums = np.zeros((0, width), np.float64)
        self.counts = np.zeros(0, np.int64)

    @property
    def keys(self) -> np.ndarray:
        """Key of each sum: group × vocabulary size + gene token."""
        return np.fromiter(self.slots, np.int64, len(self.slots))

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Add the results of a batch, by field name."""
        group = np.repeat(self.group_of_row[values["rows"]].astype(np.int64), values["n_genes"])
        keys = group * self.n_tokens + values["genes"]
        grouped = np.flatnonzero(group != NO_GROUP)
        order = grouped[np.argsort(keys[grouped], kind="stable")]
        distinct, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
        if len(distinct):
            sums = np.add.reduceat(values[self.field][order], starts, axis=0, dtype=np.float64)
            self.add_sums(distinct, sums, counts)

    def flush(self) -> None:
        """Do nothing; results are not buffered."""

    def add_sums(self, keys: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
        """Add partial sums; keys must be unique."""
        n_slots = len(self.slots) + sum(key not in self.slots for key in keys.tolist())
        if n_slots > len(self.counts):  # before any update, as allocation may fail
            capacity = max(n_slots, 3 * len(self.counts) // 2)
            self.sums = np.concatenate([self.sums, np.zeros((capacity - len(self.sums), self.sums.shape[1]))])
            self.counts = np.concatenate([self.counts, np.zeros(capacity - len(self.counts), np.int64)])
        slots = np.array([self.slots.setdefault(key, len(self.slots)) for key in keys.tolist()], np.int64)
        self.sums[slots] += sums
        self.counts[slots] += counts

    def table(self, gene_names: np.ndarray, groups: pd.Index, column: str | None) -> tuple[pd.DataFrame, np.ndarray]:
        """Table of genes, groups and cell counts, and mean vectors (sums, D), float32, in vocabulary order.

        Parameters
        ----------
        gene_names
            Name of each gene token (tokens,).
        groups
            Name of each group.
        column
            Column name of the groups; None: there is only one group.
        """
        keys = self.keys
        group, gene = np.divmod(keys, self.n_tokens)
        order = np.lexsort((group, gene))
        means = np.empty((len(keys), self.sums.shape[1]), np.float32)
        for start in range(0, len(keys), 1024):  # in blocks, as the sums may take half of the memory
            here = order[start : start + 1024]
            means[start : start + 1024] = self.sums[here] / self.counts[here, None]
        table = pool_obs(gene_names[gene[order]], group[order], groups, column)
        table[N_CELLS_COLUMN] = self.counts[order]
        return table, means


def new_pool(task: Task, group_of_row: np.ndarray) -> Pool:
    """Return an empty pool of a task's field, given the group of each kept cell (cells,)."""
    return Pool(group_of_row, len(task.checkpoint.gene_vocab), task.layout[task.pooled_field].width, task.pooled_field)


def pool_obs(genes: np.ndarray, group: np.ndarray, groups: pd.Index, column: str | None) -> pd.DataFrame:
    """Genes and groups of the rows of a pool, indexed by `gene` or `gene | group`.

    Parameters
    ----------
    genes
        Gene name of each row (rows,), or one for all rows.
    group
        Group index of each row (rows,).
    groups, column
        As for `Pool.table`.
    """
    names = np.broadcast_to(genes.astype(str), group.shape)
    index = names if column is None else names + " | " + groups[group].astype(str).to_numpy().astype(str)
    table = pd.DataFrame({GENE_COLUMN: names}, index=index)
    if column is not None:
        table[column] = pd.Categorical.from_codes(group, groups)
    return table


POOL_PATTERN = "pool-*.safetensors"
"""Glob pattern of saved pools."""


class PoolWriter:
    """Saves a pool and its completed rows periodically, to one sealed file that is replaced atomically.

    Parameters
    ----------
    folder
        Existing folder to save to.
    process
        Index of the process.
    pool
        Pool to add results to.
    run
        Id of the run.
    """

    def __init__(self, folder: Path, process: int, pool: Pool, run: str) -> None:
        self.path, self.run = folder / f"pool-{process:05}-{secrets.token_hex(4)}.safetensors", run
        self.pool, self.rows = pool, np.zeros(len(pool.group_of_row), bool)
        self.last_saved, self.seconds_to_save, self.n_unsaved = time.monotonic(), 0.0, 0
        self.failure: Exception | None = None

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Add the results of a batch; saving takes at most about 5 % of the time.

        Raises
        ------
        OutputError
            If the pool cannot be saved, now or earlier.
        """
        if self.failure is not None:
            raise self.failure
        try:
            self.pool.add(values)
        except Exception as error:  # such as MemoryError, after which the sums may be inconsistent
            self.failure = error
            raise
        self.rows[values["rows"]] = True
        self.n_unsaved += len(values["rows"])
        if time.monotonic() - self.last_saved > max(FLUSH_SECONDS, 20 * self.seconds_to_save):
            self.flush()

    def flush(self) -> None:
        """Save the pool and sync it to disk.

        Raises
        ------
        OutputError
            If the pool cannot be saved, now or earlier; the last saved file is kept.
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
                self.failure = cannot_write_results(self.path.parent, error)
                raise self.failure from error
            except Exception as error:  # such as MemoryError
                self.failure = error
                raise
            self.n_unsaved, self.seconds_to_save = 0, time.monotonic() - started
        self.last_saved = time.monotonic()


def saved_rows(folder: Path, n_rows: int) -> np.ndarray:
    """Mask (n_rows,) of the rows in saved pools, without verifying checksums."""
    done = np.zeros(n_rows, bool)
    for path in folder.glob(POOL_PATTERN):
        done |= np.unpackbits(SealedFile(path).read("rows"), count=n_rows).astype(bool)
    return done


def verified_rows(folder: Path, run: str, n_rows: int) -> np.ndarray:
    """Mask (n_rows,) of the rows in the usable saved pools of a run."""
    done = np.zeros(n_rows, bool)
    for _ in _usable_pools(folder, run, done):
        pass
    return done


def read_pools(folder: Path, run: str, pool: Pool) -> np.ndarray:
    """Add the saved pools of a run to `pool`, and return the mask of their rows."""
    done = np.zeros(len(pool.group_of_row), bool)
    for saved in _usable_pools(folder, run, done):
        pool.add_sums(saved["keys"], saved["sums"], saved["counts"])
    return done


def _usable_pools(folder: Path, run: str, done: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Iterate over saved pools, marking their rows in `done` (rows,); unusable ones are reported and deleted.

    A process that outlives its run may still save a pool with rows that another process has recomputed.
    """
    for path in sorted(folder.glob(POOL_PATTERN)):
        try:
            saved = open_for_run(path, run).read_verified()
        except DamagedError as error:
            discard(path, str(error))
            continue
        rows = np.unpackbits(saved["rows"], count=len(done)).astype(bool)
        if (done & rows).any():
            discard(path, f"{path}: contains cells that another file contains too")
            continue
        done |= rows
        yield saved
