"""Batches are as large as memory allows, and are halved when they run out of memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import torch

from tests.commands import read_result
from tests.golden_cases import CHECKPOINT, TOLERANCE, relative_error
from tests.h5ad_files import make_adata
from transcriptformer.checkpoint.load import Checkpoint, load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.checkpoint.vocabs import read_aux_vocab, read_gene_vocab
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.batch_size import MAX_CELLS, batch_limits, bytes_per_token
from transcriptformer.runtime.memory import MAX_TOKENS, preferred_batch_tokens

N_GENES = 500


def load(path: Path = CHECKPOINT, **inference: object) -> Checkpoint:
    settings = {"precision": "32", "device": "cpu", **inference}
    options = {f"model.inference_config.{key}": value for key, value in settings.items()}
    return load_checkpoint(path, load_config(path, options))


@pytest.mark.parametrize(("batch_size", "tokens_per_batch"), [(1, None), (8, None), (5000, 100), (8, 2**40)])
def test_explicit_sizes_are_kept(batch_size: int, tokens_per_batch: int | None) -> None:
    checkpoint = load(batch_size=batch_size, tokens_per_batch=tokens_per_batch)
    limits = batch_limits(checkpoint)
    suitable = preferred_batch_tokens(checkpoint.device, checkpoint.width)
    assert (limits.max_cells, limits.max_tokens) == (batch_size, tokens_per_batch or suitable)


def test_cpu_batches_fit_into_the_cache() -> None:
    cpu = torch.device("cpu")
    assert preferred_batch_tokens(cpu, width=2048) == 4096
    assert preferred_batch_tokens(cpu, width=64) == MAX_TOKENS["cpu"]
    assert preferred_batch_tokens(torch.device("cuda"), width=2048) == MAX_TOKENS["cuda"]


@pytest.mark.parametrize("tokens_per_batch", [None, 100])
@pytest.mark.parametrize("model_type", ["transcriptformer", "esm2ce"])
def test_auto_fits_into_memory_and_is_no_larger_than_useful(model_type: str, tokens_per_batch: int | None) -> None:
    options = {"batch_size": "auto", "tokens_per_batch": tokens_per_batch, "precision": "32", "device": "cpu"}
    settings = {f"model.inference_config.{key}": value for key, value in options.items()}
    checkpoint = load_checkpoint(CHECKPOINT, load_config(CHECKPOINT, {**settings, "model.model_type": model_type}))
    limits = batch_limits(checkpoint)
    assert limits.max_cells == MAX_CELLS
    assert 1 <= limits.max_tokens <= min(MAX_TOKENS["cpu"], tokens_per_batch or MAX_TOKENS["cpu"])
    assert limits.max_tokens * bytes_per_token(checkpoint) < psutil.virtual_memory().available


def test_processes_share_memory_and_at_least_one_token_is_allowed() -> None:
    checkpoint = load(batch_size="auto", tokens_per_batch=2**62)
    one_process, shared = (batch_limits(checkpoint, n).max_tokens for n in (1, 4))
    assert shared == pytest.approx(one_process / 4, rel=0.2)
    assert batch_limits(checkpoint, 10**12).max_tokens == 1


@pytest.fixture(scope="module")
def mid_sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic checkpoint's settings, four blocks of width 256 with 500 positions, and random weights."""
    path = tmp_path_factory.mktemp("mid-sized") / "checkpoint"
    shutil.copytree(CHECKPOINT, path)
    published = json.loads((path / "config.json").read_text())
    size = {"num_layers": 4, "num_heads": 8, "embed_dim": 256, "model_dim": 512, "seq_len": N_GENES}
    published["model"]["model_config"].update(size)
    (path / "config.json").write_text(json.dumps(published))
    vocab = path / "vocabs" / "homo_sapiens_gene.h5"
    with h5py.File(vocab, "w") as file:
        file["keys"] = np.array([f"ENSG{i:011}" for i in range(N_GENES)], dtype="S")
    model = load_config(path).model
    genes = read_gene_vocab([vocab], model.data_config.special_tokens, "[PAD]")
    assays = {"assay": read_aux_vocab(path / "vocabs" / "assay_vocab.json", "assay", "unknown")}
    torch.manual_seed(0)
    weights = TranscriptFormer(model.model_config, model.loss_config, genes, assays, protein_dim=320)
    torch.save(weights.state_dict(), path / "model_weights.pt")
    return path


def full_cells(path: Path, n_cells: int) -> None:
    """Write cells that express all genes but one, so that batches have no padding."""
    counts = np.random.default_rng(0).integers(1, 30, (n_cells, N_GENES - 1))
    make_adata(counts, genes=[f"ENSG{i:011}" for i in range(N_GENES - 1)]).write_h5ad(path)


PRINT_BYTES_PER_TOKEN = """
import sys
from pathlib import Path
import torch
from tests.peak_memory import peak_memory
from transcriptformer.runs.batch_size import bytes_per_token
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.data.batches import Batch
from transcriptformer.inference.embeddings import Embeddings

path, options = Path(sys.argv[1]), sys.argv[2:]
config = load_config(path, {"model.inference_config.device": "cpu"}, options)
checkpoint = load_checkpoint(path, config)
module = Embeddings(checkpoint).make_module().eval()

def peak_memory_after(n_cells, n_positions):
    batch = Batch(
        torch.arange(n_cells),
        torch.arange(n_cells * n_positions).reshape(n_cells, n_positions) % 490 + 7,
        torch.ones(n_cells, n_positions),
        torch.zeros(n_cells, 1, dtype=torch.int64),
    )
    with torch.inference_mode():
        module(batch)
    return peak_memory()

few, many = 20, 60  # the first batch also allocates constant memory
before = peak_memory_after(few, 500)
more = peak_memory_after(many, 500) - before
print(more / ((many - few) * 500), bytes_per_token(checkpoint))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("attention", ["blockwise", "plain"])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("keys", ["[embeddings]", "[embeddings,llh]"])
def test_a_token_takes_no_more_memory_than_estimated(
    mid_sized: Path, attention: str, precision: str, keys: str
) -> None:
    settings = {"attention": attention, "precision": precision, "output_keys": keys}
    options = [f"model.inference_config.{key}={value}" for key, value in settings.items()]
    code = [sys.executable, "-c", PRINT_BYTES_PER_TOKEN, str(mid_sized), *options]
    measured, estimated = map(float, subprocess.run(code, check=True, capture_output=True, text=True).stdout.split())
    assert measured <= estimated
    assert measured > estimated / 10


EMBED_IN_LIMITED_MEMORY = """
import logging, resource, sys
from pathlib import Path
import torch
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.inference.run import run

torch.set_num_threads(1)
logging.basicConfig(level=logging.WARNING, format="%(message)s")
path, data, output, batch_size, megabytes = *map(Path, sys.argv[1:4]), *map(int, sys.argv[4:])
options = {"precision": "32", "device": "cpu", "output_path": str(output)}
options |= {"batch_size": batch_size, "tokens_per_batch": 2**20}
config = load_config(path, {f"model.inference_config.{key}": value for key, value in options.items()})

def limit_memory(n_done, n_cells):
    if n_done == 0 and megabytes:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + megabytes * 2**20,) * 2)

run([data], path, config, limit_memory)
"""


def embed_in_limited_memory(
    checkpoint: Path, data: Path, output: Path, batch_size: int, megabytes: int
) -> subprocess.CompletedProcess[str]:
    arguments = map(str, (checkpoint, data, output, batch_size, megabytes))
    return subprocess.run(
        [sys.executable, "-c", EMBED_IN_LIMITED_MEMORY, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit needs Linux")
def test_a_batch_that_runs_out_of_memory_is_halved_with_the_same_result(mid_sized: Path, tmp_path: Path) -> None:
    full_cells(tmp_path / "cells.h5ad", 80)
    limited = embed_in_limited_memory(mid_sized, tmp_path / "cells.h5ad", tmp_path / "limited", 80, 300)
    assert limited.returncode == 0, limited.stderr
    assert "out of memory with 80 cells of 500 tokens; halving the batch" in limited.stderr
    assert "Traceback" not in limited.stderr
    unlimited = embed_in_limited_memory(mid_sized, tmp_path / "cells.h5ad", tmp_path / "unlimited", 4, 0)
    assert unlimited.returncode == 0, unlimited.stderr
    assert "out of memory" not in unlimited.stderr
    results = [read_result(tmp_path / name / "embeddings.h5ad") for name in ("limited", "unlimited")]
    assert list(results[0].obs_names) == list(results[1].obs_names)
    assert relative_error(results[0].obsm["embeddings"], results[1].obsm["embeddings"]) < TOLERANCE
