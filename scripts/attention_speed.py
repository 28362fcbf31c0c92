"""Compare the paths of the attention on this device, in alternating runs; `--gradients` for training."""

import argparse
import statistics
import time

import torch

from transcriptformer.model.attention.choose import ATTENTION
from transcriptformer.model.attention.definition import Attention, ScoreMod
from transcriptformer.runtime.device import choose_device

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Print median seconds of each path, and their ratios to the first one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", nargs="+", default=["blockwise", "flex"], choices=list(ATTENTION))
    parser.add_argument("--shape", nargs=4, type=int, default=[8, 16, 2048, 128], metavar=("B", "H", "T", "d"))
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gradients", action="store_true", help="include the backward pass")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    cells, heads, length, width = arguments.shape
    torch.manual_seed(0)
    tensors = [
        torch.randn(cells, length, heads, width, device=device).to(DTYPES[arguments.dtype]).transpose(1, 2)
        for _ in range(3)
    ]
    allowed = torch.ones(cells, length, dtype=torch.bool, device=device)
    mod = ScoreMod(torch.rand(cells, length, device=device), allowed, 10.0, bias_on_diagonal=not arguments.gradients)
    seconds: dict[str, list[float]] = {path: [] for path in arguments.paths}
    for i in range(arguments.repeats + 1):
        for path, values in seconds.items():
            taken = run(ATTENTION[path], tensors, mod, arguments.gradients)
            if i > 0:  # the first pass compiles
                values.append(taken)
    first = seconds[arguments.paths[0]]
    for path, values in seconds.items():
        ratios = [a / b for a, b in zip(values, first, strict=True)]
        print(f"{path}: {statistics.median(values):.3f} s, {statistics.median(ratios):.2f} × {arguments.paths[0]}")


def run(attention: Attention, tensors: list[torch.Tensor], mod: ScoreMod, gradients: bool) -> float:
    """Seconds of one pass."""
    q, k, v = (tensor.clone().requires_grad_(gradients) for tensor in tensors)
    started = time.perf_counter()
    with torch.inference_mode(not gradients):
        output = attention(q, k, v, mod)
    if gradients:
        output.sum().backward()  # type: ignore[no-untyped-call]
    output.flatten()[0].item()  # synchronizes with the device
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
