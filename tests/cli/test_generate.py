"""`transcriptformer generate`, from options to files, and its refusals in one line."""

from pathlib import Path

import anndata
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.generation.checkpoints import without_gene_head
from tests.golden_cases import CELLS, CHECKPOINT, SYNTHETIC
from transcriptformer.cli.main import app

GENE, OTHER = "ENSG00000100291", "ENSG00000100196"
SIZE = ("--n-cells", 2, "--n-genes", 9, "--total-counts", 20)


def run(folder: Path, *options: object, checkpoint: Path = CHECKPOINT) -> Result:
    fixed = ["--checkpoint-path", checkpoint, "--device", "cpu", "--precision", "32", "--output-path", folder / "out"]
    return CliRunner().invoke(app, ["generate", *map(str, fixed), *map(str, options)])


def test_new_cells_from_genes(tmp_path: Path) -> None:
    result = run(tmp_path, *SIZE, "--gene", f"{GENE}=3", "--gene", OTHER, "--assay", "10X 3' V3", "--seed", 4)
    assert result.exit_code == 0, result.output
    assert f"2 cells, 305 genes in {tmp_path / 'out' / 'cells.h5ad'}" in result.output
    cells = anndata.read_h5ad(tmp_path / "out" / "cells.h5ad")
    assert list(cells.obs["prompt"]) == [f"{GENE}=3 {OTHER}=1"] * 2
    assert list(cells.obs["assay"]) == ["10x 3' v3"] * 2
    assert (cells[:, GENE].X.toarray() == 3).all()
    assert cells.uns["generation"]["seed"] == 4
    assert (np.diff(cells.X.indptr) == 9).all()


def test_parts_of_cells_with_a_umap(tmp_path: Path) -> None:
    picture = tmp_path / "umap.png"
    result = run(tmp_path, "--data-file", CELLS, "--keep", 0.7, "--plot", picture, "--output-filename", "new.zarr")
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 1000
    cells = anndata.read_zarr(tmp_path / "out" / "new.zarr")
    assert list(cells.obs_names) == list(anndata.read_h5ad(CELLS).obs_names)
    assert cells.uns["generation"]["keep"] == 0.7


def test_large_seeds_have_a_umap_too(tmp_path: Path) -> None:
    result = run(tmp_path, "--like", CELLS, "--n-cells", 3, "--seed", 2**40, "--plot", tmp_path / "umap.svg")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "umap.svg").read_text().startswith("<?xml")


def test_wildcards_that_match_one_file(tmp_path: Path) -> None:
    (tmp_path / "some_cells.h5ad").symlink_to(CELLS.resolve())
    result = run(tmp_path, "--like", tmp_path / "some*.h5ad", "--n-cells", 2)
    assert result.exit_code == 0, result.output
    (tmp_path / "some_others.h5ad").symlink_to(CELLS.resolve())
    result = run(tmp_path, "--like", tmp_path / "some*.h5ad", "--n-cells", 2)
    assert result.exit_code == 2
    assert "ERROR: --like" in result.output
    assert "matches 2 files; give one" in result.output


def test_too_few_cells_for_a_umap(tmp_path: Path) -> None:
    anndata.read_h5ad(CELLS)[:4].copy().write_h5ad(tmp_path / "few.h5ad")
    result = run(tmp_path, "--like", tmp_path / "few.h5ad", "--n-cells", 3, "--plot", tmp_path / "umap.png")
    assert result.exit_code == 2
    assert "--plot: 7 real and generated cells; a UMAP needs at least 20" in result.output
    assert not (tmp_path / "out" / "cells.h5ad").exists(), "refused before cells are drawn"


def test_imputation(tmp_path: Path) -> None:
    result = run(tmp_path, "--data-file", CELLS, "--impute", f"{GENE}, {OTHER}")
    assert result.exit_code == 0, result.output
    cells = anndata.read_h5ad(tmp_path / "out" / "cells.h5ad")
    assert list(cells.var_names) == [GENE, OTHER]
    assert set(cells.layers) == {"probability", "rate"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*SIZE, "--temperature", 0), "--temperature"),
        ((*SIZE, "--temperature", -1), "--temperature"),
        ((*SIZE, "--top-p", 0), "--top-p"),
        ((*SIZE, "--top-p", 1.1), "--top-p"),
        ((*SIZE, "--count-rounds", -1), "--count-rounds"),
        ((*SIZE, "--seed", -1), "--seed"),
        ((*SIZE, "--n-genes", 128, "--total-counts", 500), "128 genes; the model takes at most 126"),
        ((*SIZE, "--candidates", "{genes}"), "9 genes; there are only 2 candidates"),
        ((*SIZE, "--candidates", "klingon"), "neither a file nor a species"),
        ((*SIZE, "--gene", "ENSG0000010029"), "not in the checkpoint's vocabulary"),
        ((*SIZE, "--gene", f"{GENE}=1.5"), "not a whole number"),
        ((*SIZE, "--gene", f"{GENE}=x"), "is not a count"),
        ((*SIZE, "--gene", GENE, "--gene", GENE), "occurs twice"),
        ((*SIZE, "--plot", "{picture}"), "--plot: give real cells"),
        (("--like", CELLS, "--plot", "{picture}.xyz"), "umap.png.xyz: must end in .png, .pdf, .svg"),
        (("--like", "nowhere.h5ad"), "--like nowhere.h5ad"),
        (("--like", "nowhere*.h5ad"), "--like nowhere*.h5ad: no file matches"),
        ((*SIZE, "--output-filename", "cells.txt"), "--output-filename"),
        ((*SIZE, "--config-override", "model.data_config.nothing=1"), "no such configuration key"),
        ((*SIZE, "--keep", 0.5), "--keep: applies to the cells of --data-file"),
        (("--n-cells", 3), "n_genes (--n-genes), total_counts (--total-counts): missing"),
        (("--impute", "all"), "--impute: give the cells with --data-file"),
        (("--impute", "all", "--data-file", CELLS, "--top-p", 0.5), "leave out --top-p"),
        (("--impute", "NOPE", "--data-file", CELLS), "not in the checkpoint's vocabulary"),
        (("--data-file", "nowhere.h5ad"), "nowhere.h5ad"),
        (("--data-file", CELLS, "--keep", 1), "keep (--keep)"),
    ],
)
def test_refusals_leave_nothing(options: tuple[object, ...], message: str, tmp_path: Path) -> None:
    genes, picture = tmp_path / "genes.txt", tmp_path / "umap.png"
    genes.write_text(f"{GENE}\n{OTHER}\n")
    filled = [str(option).format(genes=genes, picture=picture) for option in options]
    result = run(tmp_path, *filled)
    assert result.exit_code == 2
    errors = [line for line in result.output.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["genes.txt"]


@pytest.mark.parametrize("option", ["--data-file", "--like", "--candidates", "--impute"])
def test_an_input_is_not_overwritten(option: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    cells = tmp_path / "out" / "cells.h5ad"
    cells.write_text(f"{GENE}\n{OTHER}\n")
    others = {"--candidates": SIZE, "--impute": ("--data-file", CELLS)}.get(option, ())
    result = run(tmp_path, option, cells, *others)
    assert result.exit_code == 2
    assert f"--output-filename {cells}: is also an input" in result.output.replace("\n", "")
    assert cells.read_text() == f"{GENE}\n{OTHER}\n"
    picture = tmp_path / "cells.png"
    picture.touch()
    result = run(tmp_path, "--data-file", picture, "--plot", picture)
    assert result.exit_code == 2
    assert f"--plot {picture}: is also an input" in result.output.replace("\n", "")


def test_models_without_a_gene_head(checkpoint_copy: Path, tmp_path: Path) -> None:
    species = f"model.inference_config.pretrained_embedding=['{SYNTHETIC / 'other_species_gene.h5'}']"
    result = run(tmp_path, *SIZE, "--config-override", species)
    assert result.exit_code == 2
    assert "a new species has no gene head" in result.output
    result = run(tmp_path, *SIZE, checkpoint=without_gene_head(checkpoint_copy))
    assert result.exit_code == 1
    assert "has no gene head" in result.output
