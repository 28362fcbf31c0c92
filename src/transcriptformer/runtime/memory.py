"""Memory limits of batches, and recovery from running out of memory."""

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import psutil
import torch

from transcriptformer.errors import TranscriptFormerError

logger = logging.getLogger(__name__)

B = TypeVar("B")
R = TypeVar("R")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""`mallopt` parameters from glibc's malloc.h."""

MAX_TOKENS = {"cpu": 2**15, "mps": 2**17, "cuda": 2**18}
"""Tokens per batch by device type; larger batches are not faster."""

CACHED_BYTES = 2**25
"""Size of a batch's float32 states that stay in a CPU's cache; larger batches are slower."""

SHARE_OF_FREE_MEMORY = 0.5

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""Parts of the messages of CUDA, MPS and the CPU allocator."""

_GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Limit and usage of a control group by controller, and the page cache in its memory.stat, which can be reclaimed."""


def free_memory(device: torch.device, n_processes: int = 1) -> int:
    """Return the free bytes of a CUDA device, otherwise this process's share of the available memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() // n_processes


def available_memory() -> int:
    """Return the available bytes of the machine, or of this process's control group if it has less left.

    Containers and schedulers such as SLURM limit memory by control groups; who exceeds the limit is killed.
    """
    return min([psutil.virtual_memory().available, *_left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _left_in_groups(membership: Path, root: Path) -> Iterator[int]:
    """Yield the bytes left in each control group of this process that limits memory, versions 1 and 2."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text(encoding="utf-8").splitlines()]
    except OSError:  # not Linux
        return
    for _, controllers, name in (line for line in lines if len(line) == 3):
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        maximum, usage, cache = _GROUP_FILES[controllers]
        group = top / name.strip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # no such file, or "max"
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / usage).read_text()) - int(stat.get(cache, 0))
                yield max(0, int((folder / maximum).read_text()) - used)
            if folder == top:
                break


def preferred_batch_tokens(device: torch.device, width: int) -> int:
    """Return the fastest number of tokens per batch for a model of that width."""
    limit = MAX_TOKENS[device.type]
    return min(limit, max(1, CACHED_BYTES // (4 * width))) if device.type == "cpu" else limit


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error is a failed memory allocation, on any device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    message = str(error)
    return any(text in message for text in _OUT_OF_MEMORY)


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory for reuse; no effect elsewhere.

    Otherwise each large CPU tensor gets fresh pages from the kernel, which costs 10 % of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Halving(Generic[B, R]):
    """Compute batches; split a batch that runs out of memory in two, and later batches of its size.

    Parameters
    ----------
    compute
        Computes the result of a batch.
    size
        Returns the number of items and of tokens, including padding, of a batch.
    split
        Splits a batch in two.
    join
        Joins the results of two halves.
    unit
        Name of an item, for messages.
    advice
        What to do if a single item does not fit, for messages.
    """

    def __init__(
        self,
        compute: Callable[[B], R],
        size: Callable[[B], tuple[int, int]],
        split: Callable[[B], tuple[B, B]],
        join: Callable[[R, R], R],
        unit: str,
        advice: str,
    ) -> None:
        self.compute, self.size, self.split, self.join = compute, size, split, join
        self.unit, self.advice = unit, advice
        self.max_tokens = sys.maxsize

    def __call__(self, batch: B) -> R:
        """Compute the result of a batch.

        Raises
        ------
        TranscriptFormerError
            If a single item does not fit into memory.
        """
        n_items, n_tokens = self.size(batch)
        if n_items > 1 and n_tokens > self.max_tokens:
            return self._in_halves(batch)
        try:
            return self.compute(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if n_items == 1:
                raise TranscriptFormerError(
                    f"out of memory with a single {self.unit} of {n_tokens} tokens; {self.advice}"
                ) from error
        _empty_cache()  # outside `except`, whose traceback keeps the tensors alive
        self.max_tokens = n_tokens // 2
        logger.warning(
            "out of memory with %d %ss of %d tokens; halving the batch", n_items, self.unit, n_tokens // n_items
        )
        return self._in_halves(batch)

    def _in_halves(self, batch: B) -> R:
        first, second = self.split(batch)
        return self.join(self(first), self(second))


def _empty_cache() -> None:
    """Return the memory that PyTorch caches to the device."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
