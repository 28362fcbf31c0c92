"""Device of a run, and data type of its matrix products."""

from collections.abc import Mapping

import torch

from transcriptformer.errors import UsageError

BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")
"""PyTorch's names of the CPU instructions for bfloat16 matrix products (Intel, AMD, Arm)."""


def choose_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is the first available of cuda, mps and cpu.

    Raises
    ------
    UsageError
        If the machine or the PyTorch build does not support it.
    """
    available = [
        kind
        for kind, is_available in (
            ("cuda", torch.cuda.is_available()),
            ("mps", torch.backends.mps.is_available()),
            ("cpu", True),
        )
        if is_available
    ]
    if name != "auto" and name not in available:
        raise UsageError(f"--device {name}: not available; available devices: {', '.join(available)}")
    return torch.device(available[0] if name == "auto" else name)


def compute_dtype(
    precision: str, device: torch.device, capabilities: Mapping[str, object] | None = None
) -> torch.dtype:
    """Return the type of matrix products; normalization, softmax and residual states are always float32.

    Parameters
    ----------
    precision
        `32`, `bf16-mixed` or `16-mixed`; `16-mixed` is float16 on GPUs, and on CPUs bfloat16 where the CPU has
        instructions for it, otherwise float32.
    capabilities
        CPU features by name; None: query PyTorch.
    """
    if precision == "32":
        return torch.float32
    if precision == "bf16-mixed":
        return torch.bfloat16
    if device.type != "cpu":
        return torch.float16
    if capabilities is None:
        capabilities = cpu_capabilities()
    return torch.bfloat16 if any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS) else torch.float32


def cpu_capabilities() -> Mapping[str, object]:
    """Return PyTorch's CPU capabilities by name; empty in releases that do not report them."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def count_devices(device: torch.device, wanted: int) -> int:
    """Return the number of devices to use; -1: all. On a CPU, each device is a process.

    Raises
    ------
    UsageError
        If fewer are available.
    """
    if device.type == "cpu":
        return 1 if wanted == -1 else wanted  # one process uses all cores
    available = torch.cuda.device_count() if device.type == "cuda" else 1
    if wanted > available:
        raise UsageError(f"--num-gpus {wanted}: only {available} available on this machine")
    return available if wanted == -1 else wanted
