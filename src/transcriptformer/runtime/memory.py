"""How much memory a run may use, and what happens when there is none left."""

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
"""Numbers of two settings in glibc's malloc.h."""

MOST_TOKENS = {"cpu": 2**15, "mps": 2**17, "cuda": 2**18}
"""The same for tokens, by device: more do not make it faster."""

CACHED_BYTES = 2**25
"""States of a batch, in float32, that a CPU has at hand: larger batches make it slower."""

SHARE_OF_FREE_MEMORY = 0.5


def free_memory(device: torch.device, n_processes: int = 1) -> int:
    """Bytes that one of `n_processes` on this machine may use on its device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // n_processes


def suitable_tokens(device: torch.device, width: int) -> int:
    """How many tokens of a model of that width a device likes best."""
    most = MOST_TOKENS[device.type]
    return min(most, max(1, CACHED_BYTES // (4 * width))) if device.type == "cpu" else most


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the machine, had no more memory to give."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    message = str(error)
    return "can't allocate memory" in message or "not enough memory" in message  # what the CPU's allocator says


def keep_freed_memory() -> None:
    """Let this process keep what it frees for what it needs next, where the C library can (glibc).

    Otherwise every large tensor on a CPU is taken from the kernel anew, page by page, which costs a tenth of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Halving(Generic[B, R]):
    """Computes batches; one that does not fit into memory is halved, and so are later ones of its size.

    Parameters
    ----------
    compute
        From a batch to its result.
    size
        Items and tokens of a batch, padding included.
    split
        A batch of several items as two.
    join
        The results of two halves as one.
    unit
        What an item is called.
    advice
        What to do where a single item does not fit.
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
        """Compute a batch.

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
        # Outside of `except`, whose traceback would hold on to the tensors.
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        self.max_tokens = n_tokens // 2
        logger.warning(
            "out of memory with %d %ss of %d tokens: continuing in halves", n_items, self.unit, n_tokens // n_items
        )
        return self._in_halves(batch)

    def _in_halves(self, batch: B) -> R:
        first, second = self.split(batch)
        return self.join(self(first), self(second))
