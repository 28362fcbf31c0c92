"""Memory use depends neither on the number of cells nor on the size of the results; weights are held once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.commands import inference_command
from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import random_adata
from transcriptformer.checkpoint.published import load_config
from transcriptformer.checkpoint.vocabs import read_aux_vocab, read_gene_vocab
from transcriptformer.model.transcriptformer import TranscriptFormer

LOAD_AND_PRINT_PEAK_MEMORY = """
import sys
from pathlib import Path
from tests.peak_memory import peak_memory
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config

path, precision = Path(sys.argv[1]), sys.argv[2]
config = load_config(path, {"model.inference_config.precision": precision, "model.inference_config.device": "cpu"})
before = peak_memory()
load_checkpoint(path, config)
print(peak_memory() - before)
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic checkpoint scaled to width 1,024: about 300 MB of random weights."""
    path = tmp_path_factory.mktemp("large") / "checkpoint"
    shutil.copytree(CHECKPOINT, path)
    published = json.loads((path / "config.json").read_text())
    published["model"]["model_config"].update(num_layers=8, num_heads=8, embed_dim=1024, model_dim=1024)
    (path / "config.json").write_text(json.dumps(published))
    with h5py.File(path / "vocabs" / "homo_sapiens_gene.h5", "w") as file:
        file["keys"] = np.array([f"ENSG{i:011}" for i in range(20_000)], dtype="S")
    model = load_config(path).model
    genes = read_gene_vocab([path / "vocabs" / "homo_sapiens_gene.h5"], model.data_config.special_tokens, "[PAD]")
    assays = {"assay": read_aux_vocab(path / "vocabs" / "assay_vocab.json", "assay", "unknown")}
    weights = TranscriptFormer(model.model_config, model.loss_config, genes, assays, protein_dim=1024).state_dict()
    torch.save(weights, path / "model_weights.pt")
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_loading_holds_the_weights_once(large_checkpoint: Path, precision: str) -> None:
    code = [sys.executable, "-c", LOAD_AND_PRINT_PEAK_MEMORY, str(large_checkpoint), precision]
    peak = int(subprocess.run(code, check=True, capture_output=True, text=True).stdout)
    assert peak < 1.2 * (large_checkpoint / "model_weights.pt").stat().st_size


RUN_AND_PRINT_PEAK_MEMORY = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 and 10,000 full-length cells; the latter have 1,270,000 gene embeddings of 128 bytes."""
    folder = tmp_path_factory.mktemp("cells")
    for n_cells in (1_000, 10_000):
        random_adata(n_cells, n_genes=130, density=1).write_h5ad(folder / f"{n_cells}.h5ad")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "options", [(), ("--emb-type", "cge"), ("--emb-type", "cge", "--cge-pool", "gene")], ids=" ".join
)
def test_memory_does_not_grow_with_the_number_of_cells(files: Path, options: tuple[str, ...], tmp_path: Path) -> None:
    peaks = []
    for n_cells in (1_000, 10_000):
        data = files / f"{n_cells}.h5ad"
        command = inference_command("--data-file", data, "--output-path", tmp_path / str(n_cells), *options)
        run = [sys.executable, "-c", RUN_AND_PRINT_PEAK_MEMORY, *command]
        peaks.append(int(subprocess.run(run, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] < 1.15 * peaks[0]
