"""Which device a run uses, and in which type its matrix products are computed there."""

from collections.abc import Mapping

import torch

from transcriptformer.errors import UsageError


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


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type of the matrix products; normalization, softmax and the states between blocks are always float32.

    Parameters
    ----------
    precision
        `32`, `bf16-mixed`, or `16-mixed`: float16 on a GPU, on a CPU bfloat16 where it has instructions for it.
    """
    if precision == "32":
        return torch.float32
    if precision == "bf16-mixed":
        return torch.bfloat16
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32
    return torch.float16


def _cpu_multiplies_bfloat16() -> bool:
    # Releases of PyTorch that cannot tell have no get_capabilities: float32 is always right.
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))
