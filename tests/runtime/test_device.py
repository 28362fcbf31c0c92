import pytest
import torch

from transcriptformer.errors import UsageError
from transcriptformer.runtime.device import choose_device, compute_dtype

ABSENT = [
    name
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
    if not there
]


@pytest.mark.parametrize("name", ABSENT)
def test_unavailable_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device {name}: not available; available devices: .*cpu"):
        choose_device(name)


def test_auto_is_an_available_device() -> None:
    assert choose_device("auto").type in {"cuda", "mps", "cpu"}
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("32", "cpu", torch.float32),
        ("32", "cuda", torch.float32),
        ("16-mixed", "cuda", torch.float16),
        ("16-mixed", "mps", torch.float16),
        ("bf16-mixed", "cpu", torch.bfloat16),
    ],
)
def test_precision_sets_the_matrix_product_type(precision: str, device: str, expected: torch.dtype) -> None:
    assert compute_dtype(precision, torch.device(device)) is expected


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_cpu_uses_bfloat16_only_with_hardware_support(capabilities: dict[str, bool], expected: torch.dtype) -> None:
    assert compute_dtype("16-mixed", torch.device("cpu"), capabilities) is expected
