"""The path of the attention that a run takes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from transcriptformer.config import ModelConfig
from transcriptformer.model.attention.blockwise import blockwise_attention
from transcriptformer.model.attention.choose import ATTENTION, choose_attention
from transcriptformer.model.attention.flex import MIN_LENGTH, flex_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODEL = ModelConfig(num_layers=12, num_heads=16, embed_dim=2048, model_dim=2048, seq_len=2047)
SMALL_MODEL = ModelConfig(num_layers=2, num_heads=2, embed_dim=32, model_dim=32, seq_len=2047)
AMX = {"amx_bf16": True}
HUMAN_CELLS = np.full(1000, 1800)


@pytest.mark.parametrize("lengths", [HUMAN_CELLS, None], ids=["inference", "training"])
def test_a_path_that_is_named_is_taken(lengths: np.ndarray | None) -> None:
    chosen = [choose_attention(name, CPU, torch.bfloat16, MODEL, lengths) for name in ATTENTION]
    assert chosen == list(ATTENTION.values())


@pytest.mark.parametrize("lengths", [np.full(10**7, 1800), None], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_without_amx_computes_blockwise(dtype: torch.dtype, lengths: np.ndarray | None) -> None:
    assert choose_attention("auto", CPU, dtype, MODEL, lengths, {"avx512_bf16": True}) is blockwise_attention


def test_in_float32_a_cpu_computes_blockwise() -> None:
    assert choose_attention("auto", CPU, torch.float32, MODEL, HUMAN_CELLS, AMX) is blockwise_attention


def test_a_small_run_does_not_wait_for_the_compiler() -> None:
    assert choose_attention("auto", CPU, torch.bfloat16, MODEL, HUMAN_CELLS[:20], AMX) is blockwise_attention
    assert choose_attention("auto", CUDA, torch.float16, MODEL, HUMAN_CELLS[:20]) is blockwise_attention


def test_neither_does_a_small_model_nor_a_run_of_short_cells() -> None:
    assert choose_attention("auto", CPU, torch.bfloat16, SMALL_MODEL, HUMAN_CELLS, AMX) is blockwise_attention
    short = np.full(10**7, MIN_LENGTH - 1)
    assert choose_attention("auto", CPU, torch.bfloat16, MODEL, short, AMX) is blockwise_attention


def test_without_a_compiler_attention_is_blockwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert choose_attention("auto", CPU, torch.bfloat16, MODEL, HUMAN_CELLS, AMX) is blockwise_attention


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_large_run_with_amx_is_worth_compiling_for() -> None:
    torch.compiler.reset()
    assert choose_attention("auto", CPU, torch.bfloat16, MODEL, HUMAN_CELLS, AMX) is flex_attention


COMPILE = """
import torch
from transcriptformer.config import ModelConfig
from transcriptformer.model.attention.choose import compiles
model = ModelConfig(num_layers=2, num_heads=2, embed_dim=32, model_dim=32, seq_len=2047)
with torch.inference_mode():
    print(compiles(torch.device("cpu"), torch.float32, model, trains=False))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("compiler", "expected"), [("exec g++", "True"), ("exit 1", "False")])
def test_whether_the_kernel_compiles_is_tried(compiler: str, expected: str, tmp_path: Path) -> None:
    """In a process of its own, for PyTorch remembers how its compiler was."""
    (tmp_path / "cxx").write_text(f'#!/bin/sh\n{compiler} "$@"\n')
    (tmp_path / "cxx").chmod(0o755)
    environment = {**os.environ, "CXX": str(tmp_path / "cxx"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert result.stdout.split()[-1] == expected
