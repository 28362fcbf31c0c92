"""Inputs of kinds that people report: they work, or one line says what to do (cases stored next to the checkout)."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.golden_cases import CELLS, CHECKPOINT, SYNTHETIC, TOLERANCE, relative_error
from transcriptformer.cli.main import app

CASES = Path(__file__).parents[2] / "shared" / "cases"

FILE = "embeddings.h5ad"

CASE_NAMES = sorted(json.loads((CASES / "cases.json").read_text())) if CASES.is_dir() else []


def run(folder: Path, data: str, output: Path) -> Result:
    """Run `inference` with the options of a case, whose files are in `folder`."""
    words = [str(folder / word) if (folder / word).exists() else word for word in shlex.split(data)]
    fixed = ["inference", "--checkpoint-path", str(CHECKPOINT), "--precision", "32", "--device", "cpu"]
    return CliRunner().invoke(app, [*fixed, "--output-path", str(output), *words])


def completed(folder: Path, copy: Path) -> Path:
    """Return a folder of a case; tables that were lost from a folder of Cell Ranger are written to a copy."""
    if not (folder / "mtx").exists() or (folder / "mtx" / "barcodes.tsv").exists():
        return folder
    shutil.copytree(folder / "mtx", copy / "mtx")
    adata = anndata.read_h5ad(CELLS)
    genes = adata.var["ensembl_id"].astype(str)
    lines = [f"{gene}\tNAME{i}\tGene Expression\n" for i, gene in enumerate(genes)]
    copy.chmod(0o755)
    (copy / "mtx").chmod(0o755)
    (copy / "mtx" / "features.tsv").write_text("".join(lines))
    (copy / "mtx" / "barcodes.tsv").write_text("".join(f"{name}\n" for name in adata.obs_names))
    return copy


def assert_line(done: Result, output: Path, words: str) -> None:
    assert done.exit_code not in (0, None), done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    assert len(lines) == 1
    assert re.search(words, lines[0])
    assert "internal error" not in lines[0]
    assert not [path for path in output.rglob("*") if path.is_file()]


@cache
def embeddings(of: str) -> np.ndarray:
    """Embeddings of the synthetic cells, without the assay or with another one."""
    if of == "golden":
        return np.load(SYNTHETIC / "expected" / "cell.npz")["embeddings"]
    adata = anndata.read_h5ad(CELLS)
    if of == "no assay":
        del adata.obs["assay"]
    else:
        adata.obs["assay"] = of
    from transcriptformer.api import embed, load

    embed(adata, load(CHECKPOINT, device="cpu", precision="32"))
    return adata.obsm["X_transcriptformer"]


def assert_embeddings(output: Path, expected: np.ndarray) -> None:
    assert relative_error(anndata.read_h5ad(output / FILE).obsm["embeddings"], expected) < TOLERANCE


def equal(folder: Path, done: Result, output: Path, words: str) -> None:
    assert done.exit_code == 0, done.output
    assert_embeddings(output, embeddings("golden"))


def equal_no_assay(folder: Path, done: Result, output: Path, words: str) -> None:
    assert done.exit_code == 0, done.output
    assert_embeddings(output, embeddings("no assay"))


def same_as_assay(folder: Path, done: Result, output: Path, words: str) -> None:
    assert done.exit_code == 0, done.output
    assert_embeddings(output, embeddings(words))


def equal_or_line(folder: Path, done: Result, output: Path, words: str) -> None:
    if done.exit_code == 0:
        assert_embeddings(output, embeddings("golden"))
    else:
        assert_line(done, output, words)


def line_before_computing(folder: Path, done: Result, output: Path, words: str) -> None:
    assert_line(done, output, words)


def runs(folder: Path, done: Result, output: Path, words: str) -> None:
    assert done.exit_code == 0, done.output
    assert words in done.output


def runs_or_line(folder: Path, done: Result, output: Path, words: str) -> None:
    if done.exit_code == 0:
        assert anndata.read_h5ad(output / FILE).n_obs == 48
    else:
        assert_line(done, output, words)


def equal_genes(folder: Path, done: Result, output: Path, words: str) -> None:
    """Equal to what comes out when the ids are plain."""
    assert done.exit_code == 0, done.output
    plain = output / "plain"
    plain.mkdir()
    adata = anndata.read_h5ad(folder / "in.h5ad")
    with h5py.File(next(folder.glob("*_gene.h5"))) as file:
        genes = [key.decode() for key in file["keys"][:]]
        rows = [file["arrays"][gene][:] for gene in genes]
    names = {gene: f"gene{i:05}" for i, gene in enumerate(genes)}
    with h5py.File(plain / "genes.h5", "w") as file:
        file["keys"] = np.array([names[gene].encode() for gene in genes])
        for gene, row in zip(genes, rows, strict=True):
            file[f"arrays/{names[gene]}"] = row
    adata.var["ensembl_id"] = [names.get(str(gene), f"other{i}") for i, gene in enumerate(adata.var["ensembl_id"])]
    adata.write_h5ad(plain / "in.h5ad")
    assert run(plain, "--data-file in.h5ad --pretrained-embedding genes.h5", plain / "out").exit_code == 0
    assert_embeddings(output, anndata.read_h5ad(plain / "out" / FILE).obsm["embeddings"])


CHECKS: dict[str, Callable[[Path, Result, Path, str], None]] = {
    check.__name__: check
    for check in (
        *(equal, equal_no_assay, equal_genes, equal_or_line, line_before_computing, runs, runs_or_line, same_as_assay),
    )
}


@pytest.mark.skipif(not CASES.is_dir(), reason=f"no cases in {CASES}")
@pytest.mark.parametrize("name", CASE_NAMES)
@pytest.mark.filterwarnings("ignore")
def test_reported_inputs_work_or_say_what_to_do(name: str, tmp_path: Path) -> None:
    case = json.loads((CASES / "cases.json").read_text())[name]
    folder = completed(CASES / name, tmp_path / "case")
    done = run(folder, case["data"], tmp_path / "out")
    assert "Traceback" not in done.output
    kind, _, words = case["expect"].partition(":")
    CHECKS[kind](folder, done, tmp_path / "out", words)
