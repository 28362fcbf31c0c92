"""The compiled attention against the definition, and when it is chosen."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from transcriptformer.config import ModelConfig
from transcriptformer.model.attention.definition import Attention, blockwise_attention, count_bias, plain_attention
from transcriptformer.model.attention.flex import (
    ATTENTION,
    SHORT,
    choose_attention,
    flex_attention,
    look_bias_up,
)

CPU, BF16 = torch.device("cpu"), torch.bfloat16
MODEL = ModelConfig(num_layers=12, num_heads=16, embed_dim=2048, model_dim=2048, seq_len=2047)
SMALL_MODEL = ModelConfig(num_layers=2, num_heads=2, embed_dim=32, model_dim=32, seq_len=2047)
HUMAN_CELLS = np.full(1000, 1800)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
quietly = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys, values, biases of the keys, and which of them are allowed."""


@pytest.fixture(autouse=True)
def forget_what_is_compiled() -> None:
    """A function is compiled a few times at most; these tests ask for more."""
    torch.compiler.reset()


def random_case(seed: int, cells: int, length: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (2 * torch.randn(cells, length, 3, 24, generator=generator).transpose(1, 2) for _ in range(3))
    bias = count_bias(30 * torch.rand(cells, length, generator=generator), 1e-6)
    allowed = torch.rand(cells, length, generator=generator) < 0.8
    allowed[0, :2] = False  # queries without any key, and an unknown auxiliary token
    return q, k, v, bias, allowed


@pytest.mark.slow
@needs_compiler
@quietly
@pytest.mark.parametrize("softcap", [0.0, 10.0])
def test_the_compiled_attention_agrees_with_the_definition(softcap: float) -> None:
    with torch.inference_mode():
        for seed, (cells, length) in enumerate([(2, SHORT), (3, SHORT + 1), (2, SHORT + 200), (2, 1000), (3, 40)]):
            case = random_case(seed, cells, length)
            assert_agrees(flex_attention, case, softcap, True)


@quietly
@pytest.mark.parametrize("softcap", [0.0, 10.0])
@pytest.mark.parametrize("on_diagonal", [True, False])
def test_what_a_gpu_compiles_agrees_with_the_definition(softcap: float, on_diagonal: bool) -> None:
    with torch.compiler.set_stance("force_eager"):
        assert_agrees(look_bias_up, random_case(0, 3, 150), softcap, on_diagonal)


def assert_agrees(path: Attention, case: Case, softcap: float, on_diagonal: bool) -> None:
    q, k, v, bias, allowed = case
    plain = plain_attention(q, k, v, bias, allowed, softcap, on_diagonal)
    assert (path(q, k, v, bias, allowed, softcap, on_diagonal) - plain).norm() <= 1e-5 * plain.norm()


def test_without_the_bias_on_the_diagonal_it_agrees_too() -> None:
    assert_agrees(flex_attention, random_case(0, 2, SHORT), 10.0, False)


@pytest.mark.slow
@needs_compiler
@quietly
def test_in_bfloat16_it_is_as_near_to_the_definition_as_attention_in_blocks() -> None:
    q, k, v, bias, allowed = random_case(0, 2, 700)
    exact = plain_attention(q, k, v, bias, allowed, 10.0, True)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    with torch.inference_mode():
        compiled, in_blocks = (
            (path(q, k, v, bias, allowed, 10.0, True).float() - exact).norm() / exact.norm()
            for path in (flex_attention, blockwise_attention)
        )
    assert compiled < 2 * in_blocks < 2e-2


def test_a_path_that_is_named_is_taken() -> None:
    assert [choose_attention(name, CPU, BF16, MODEL, HUMAN_CELLS) for name in ATTENTION] == list(ATTENTION.values())


def test_a_small_run_does_not_wait_for_a_compiler() -> None:
    assert choose_attention("auto", CPU, BF16, MODEL, HUMAN_CELLS[:20]) is blockwise_attention
    assert choose_attention("auto", torch.device("cuda"), torch.float16, MODEL, HUMAN_CELLS[:20]) is blockwise_attention


def test_neither_does_a_small_model_nor_a_run_of_short_cells() -> None:
    assert choose_attention("auto", CPU, BF16, SMALL_MODEL, HUMAN_CELLS) is blockwise_attention
    assert choose_attention("auto", CPU, BF16, MODEL, np.full(10**7, SHORT - 1)) is blockwise_attention


def test_in_float32_a_cpu_is_faster_in_blocks() -> None:
    assert choose_attention("auto", CPU, torch.float32, MODEL, HUMAN_CELLS) is blockwise_attention


def test_without_a_compiler_attention_runs_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert choose_attention("auto", CPU, BF16, MODEL, HUMAN_CELLS) is blockwise_attention


CHOOSE_PATH = """
import numpy as np
import torch
from transcriptformer.config import ModelConfig
from transcriptformer.model.attention.flex import choose_attention
model = ModelConfig(num_layers=12, num_heads=16, embed_dim=2048, model_dim=2048, seq_len=2047)
print(choose_attention("auto", torch.device("cpu"), torch.bfloat16, model, np.full(1000, 1800)).__name__)
"""


@pytest.mark.slow
def test_where_the_compiler_fails_attention_runs_in_blocks(tmp_path: Path) -> None:
    """In a process of its own, for PyTorch remembers how its compiler was."""
    (tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    environment = {"PATH": str(tmp_path), "CXX": "g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", "-c", CHOOSE_PATH]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert result.stdout.split()[-1] == "blockwise_attention"


@pytest.mark.slow
@needs_compiler
@quietly
def test_a_large_run_on_a_cpu_is_worth_compiling_for() -> None:
    assert choose_attention("auto", CPU, BF16, MODEL, HUMAN_CELLS) is flex_attention
