"""Which device a run uses, and in which type its matrix products are computed there."""

from collections.abc import Mapping

import torch

from transcriptformer.errors import UsageError

BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")
"""PyTorch's names of CPU instructions that multiply bfloat16 matrices (Intel, AMD, Arm)."""


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first of cuda, mps and cpu that is there.

    Raises
    ------
    UsageError
        If this machine, or this build of PyTorch, does not have it.
    """
    available = [
        kind
        for kind, there in (
            ("cuda", torch.cuda.is_available()),
            ("mps", torch.backends.mps.is_available()),
            ("cpu", True),
        )
        if there
    ]
    if name != "auto" and name not in available:
        raise UsageError(f"--device {name}: not available here; this machine has {', '.join(available)}")
    return torch.device(available[0] if name == "auto" else name)


def compute_dtype(
    precision: str, device: torch.device, capabilities: Mapping[str, object] | None = None
) -> torch.dtype:
    """Type of the matrix products; normalization, softmax and the states between blocks are always float32.

    Parameters
    ----------
    precision
        `32`, `bf16-mixed`, or `16-mixed`: float16 on a GPU, on a CPU bfloat16 where it has instructions for it.
    capabilities
        What the CPU can do, by name; None: ask PyTorch.
    """
    if precision == "32":
        return torch.float32
    if precision == "bf16-mixed":
        return torch.bfloat16
    if device.type != "cpu":
        return torch.float16
    if capabilities is None:
        # Releases of PyTorch that cannot tell have no get_capabilities: float32 is always right.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS) else torch.float32


def count_devices(device: torch.device, wanted: int) -> int:
    """How many devices of that kind to use; -1 stands for all. On a CPU a device is a process.

    Raises
    ------
    UsageError
        If there are fewer.
    """
    if device.type == "cpu":
        return 1 if wanted == -1 else wanted  # one process uses all cores
    available = torch.cuda.device_count() if device.type == "cuda" else 1
    if wanted > available:
        raise UsageError(f"--num-gpus {wanted}: this machine has {available}")
    return available if wanted == -1 else wanted
