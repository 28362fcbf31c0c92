"""How much memory a run may use, and what happens when there is none left."""

import ctypes
import sys

import psutil
import torch

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
