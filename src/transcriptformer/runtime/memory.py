"""Memory limits of batches, and recovery from running out of memory."""

import ctypes
import logging
import sys
from collections.abc import Callable
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


def free_memory(device: torch.device, n_processes: int = 1) -> int:
    """Return the free bytes of a CUDA device, otherwise this process's share of the available host memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // n_processes


def preferred_batch_tokens(device: torch.device, width: int) -> int:
    """Return the fastest number of tokens per batch for a model of that width."""
    limit = MAX_TOKENS[device.type]
    return min(limit, max(1, CACHED_BYTES // (4 * width))) if device.type == "cpu" else limit


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error is a failed memory allocation, on any device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    message = str(error)
    return "can't allocate memory" in message or "not enough memory" in message  # from the CPU allocator


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory for reuse; no effect elsewhere.

    Otherwise each large CPU tensor gets fresh pages from the kernel, which costs 10 % of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Halving(Generic[B, R]):
    """Compute batches, halving those that run out of memory, and later ones of their size.

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
        # Outside `except`, whose traceback keeps the tensors alive.
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        self.max_tokens = n_tokens // 2
        logger.warning(
            "out of memory with %d %ss of %d tokens; halving the batch", n_items, self.unit, n_tokens // n_items
        )
        return self._in_halves(batch)

    def _in_halves(self, batch: B) -> R:
        first, second = self.split(batch)
        return self.join(self(first), self(second))
