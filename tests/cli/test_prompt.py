"""`transcriptformer prompt` as people type it, and what each kind of bad input is answered with."""

import re
from pathlib import Path

import anndata
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.generation.checkpoints import load, without_gene_head
from tests.golden_cases import CHECKPOINT, SYNTHETIC
from tests.h5ad_files import GENES, random_adata
from transcriptformer.cli.main import app
from transcriptformer.generation.next_genes import next_genes
from transcriptformer.generation.pmi import pmi

LGALS1 = "ENSG00000100097"


def invoke(*arguments: object, checkpoint: Path = CHECKPOINT) -> Result:
    fixed = ["prompt", "--checkpoint-path", checkpoint, "--precision", "32", "--device", "cpu"]
    return CliRunner().invoke(app, [str(argument) for argument in [*fixed, *arguments]], env={"COLUMNS": "200"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with lists, a table of prompts and cells."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sources.txt").write_text(f"{GENES[7]}\nLGALS1=2\n")
    (tmp_path / "targets.txt").write_text("\n".join(GENES[:5]))
    (tmp_path / "prompts.tsv").write_text(f"name\tgenes\tassay\nfirst\t{GENES[3]}=2 LGALS1\tMERFISH\nsecond\t\t\n")
    cells = random_adata(9, n_genes=60)
    cells.obs["cell_type"] = ["B", "T", "NK"] * 3
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path


def assert_refused(result: Result, exit_code: int, message: str, folder: Path) -> None:
    """One clear line, that exit code, no traceback, nothing left behind."""
    assert result.exit_code == exit_code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert result.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert {path.name for path in folder.iterdir()} <= {
        *("sources.txt", "targets.txt", "prompts.tsv", "cells.h5ad", "bad.csv", "one.txt", "checkpoint")
    }


def test_the_most_probable_genes_are_printed(folder: Path) -> None:
    result = invoke("--gene", "LGALS1=3", "--gene", GENES[0], "--assay", "10X multiome", "--top", 4)
    assert result.exit_code == 0, result.output
    expected = next_genes(load(), [[("LGALS1", 3), GENES[0]]], assay="10x multiome")
    best = np.argsort(-expected.X[0])[:4]
    found = [line.split("│")[1:-1] for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in found] == expected.var_names[best].tolist()
    assert [float(row[-2]) for row in found] == pytest.approx(np.exp(expected.X[0, best]), rel=1e-2)
    assert f"prompt: {LGALS1}=3 {GENES[0]}=1" in result.stdout
    assert [path for path in folder.iterdir() if path.suffix == ".zarr"] == []


@pytest.mark.parametrize("name", ["next.h5ad", "next.zarr", "new/next.h5ad"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_table_of_prompts_is_written_as_the_api_returns_it(name: str, folder: Path) -> None:
    result = invoke("--prompts", "prompts.tsv", "--top", 0, "--output-path", name)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"2 × 305: X, layers['pmi'] in {name}\n"
    read = anndata.read_zarr(name) if name.endswith("zarr") else anndata.read_h5ad(name)
    expected = next_genes(load(), [[(GENES[3], 2), "LGALS1"], []], assay=["MERFISH", None])
    np.testing.assert_array_equal(read.X, expected.X)
    np.testing.assert_array_equal(read.layers["pmi"], expected.layers["pmi"])
    assert read.obs_names.tolist() == ["first", "second"]
    assert read.obs["assay"].tolist() == ["MERFISH", "unknown"]
    assert read.uns["transcriptformer"]["weights_sha256"] == load().weights_sha256()
    assert [path.name for path in Path(name).parent.glob("*next*")] == [Path(name).name]


def test_sources_and_targets_make_the_matrix_of_the_api(folder: Path) -> None:
    options = ["--sources", "sources.txt", "--targets", "targets.txt", "--gene", f"{GENES[100]}=4", "--null", 12]
    result = invoke(*options, "--seed", 5, "--assay", "MERFISH", "--output-path", "pmi.h5ad")
    assert result.exit_code == 0, result.output
    expected = pmi(
        load(),
        [GENES[7], ("LGALS1", 2)],
        GENES[:5],
        context=[(GENES[100], 4)],
        null=12,
        seed=5,
        assay="MERFISH",
    )
    read = anndata.read_h5ad("pmi.h5ad")
    assert set(read.layers) == {"pmi", "log_p_context", "z", "p", "q"}
    for name in read.layers:
        np.testing.assert_array_equal(read.layers[name], expected.layers[name])
    assert f"{GENES[7]}" in result.stdout
    assert f"after {GENES[100]}=4" in result.stdout


def test_cells_of_a_file_are_prompts_by_group(folder: Path) -> None:
    options = ["--data-file", "cells.h5ad", "--groupby", "cell_type", "--cells-per-group", 2]
    result = invoke(*options, "--candidates", "targets.txt", "--output-path", "groups.h5ad", "--plot", "groups.svg")
    assert result.exit_code == 0, result.output
    read = anndata.read_h5ad("groups.h5ad")
    assert read.obs["n_cells"].to_dict() == {"B": 2, "NK": 2, "T": 2}
    np.testing.assert_allclose(np.exp(read.X).sum(1), 1, rtol=1e-5)
    assert read.uns["renormalized_over"].tolist() == GENES[:5]
    assert "<svg" in Path("groups.svg").read_text()
    assert "heatmap of PMI in groups.svg" in result.stdout
    assert "B: 2 cells" in result.stdout


def test_pmi_in_groups_is_plotted(folder: Path) -> None:
    result = invoke(
        *("--sources", "sources.txt", "--data-file", "cells.h5ad", "--groupby", "cell_type"),
        *("--plot", "pmi.png", "--top", 1),
    )
    assert result.exit_code == 0, result.output
    assert Path("pmi.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options",
    [
        ["--gene", "LGALS1"],
        ["--prompts", "single.txt"],
        ["--data-file", "cells.h5ad"],
        ["--sources", "one.txt"],
        ["--sources", "one.txt", "--data-file", "cells.h5ad"],
        ["--sources", "sources.txt", "--targets", "one.txt"],
    ],
)
def test_a_picture_of_a_single_row_is_refused_before_anything_is_computed(options: list[str], folder: Path) -> None:
    (folder / "one.txt").write_text(GENES[0])
    (folder / "single.txt").write_text(f"genes\n{GENES[0]}\n")
    result = invoke(*options, "--plot", "x.png", "--output-path", "x.h5ad", checkpoint=folder / "gone")
    assert result.exit_code == 2, result.output
    assert "ERROR: --plot: a heatmap needs at least two rows and two genes" in result.stderr


def test_numbers_are_written_even_if_they_cannot_be_drawn(folder: Path) -> None:
    cells = random_adata(4, n_genes=60)
    cells.obs["cell_type"] = "B"
    cells.write_h5ad(folder / "cells.h5ad")
    options = ["--data-file", "cells.h5ad", "--groupby", "cell_type"]
    result = invoke(*options, "--plot", "x.png", "--output-path", "x.h5ad")
    assert result.exit_code == 2, result.output
    assert "ERROR: --plot: a heatmap needs at least two rows" in result.stderr
    assert anndata.read_h5ad("x.h5ad").obs["n_cells"].to_dict() == {"B": 4}
    assert not Path("x.png").exists()


def test_many_prompts_are_not_all_printed(folder: Path) -> None:
    (folder / "prompts.tsv").write_text("\n".join(["genes", *GENES[:15]]))
    result = invoke("--prompts", "prompts.tsv", "--top", 1)
    assert result.stdout.count("=1\n") == 10
    assert result.stdout.endswith("and 5 more; --output-path writes all\n")


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        ([], 2, "nothing to ask: give --gene, --prompts, --data-file or --sources"),
        (["--gene", "FOXNONE"], 2, r"--gene: 1 gene is not in the checkpoint's vocabulary: 'FOXNONE'"),
        (["--gene", "LGALS1", "--gene", LGALS1], 2, f"--gene: gene {LGALS1} occurs twice"),
        (["--gene", "LGALS1=-1"], 2, "--gene: count -1 of LGALS1 is not a whole number of at least 1"),
        (["--gene", "LGALS1=0"], 2, "count 0 of LGALS1"),
        (["--gene", "LGALS1=1.5"], 2, "count 1.5 of LGALS1"),
        (["--gene", "LGALS1=many"], 2, "'many' is not a count"),
        ([x for gene in GENES[:126] for x in ("--gene", gene)], 2, "--gene: 126 genes; the model takes at most 125"),
        (["--prompts", "gone.csv"], 2, "--prompts gone.csv: no such file"),
        (["--prompts", "sources.txt"], 2, "has no column 'genes'"),
        (["--prompts", "bad.csv"], 2, "--prompts bad.csv, prompt 2: gene .* occurs twice"),
        (["--prompts", "prompts.tsv", "--assay", "MERFISH"], 2, "has a column assay; give one of them"),
        (["--gene", "LGALS1", "--prompts", "prompts.tsv"], 2, "--prompts: cannot be combined with --gene"),
        (["--gene", "LGALS1", "--data-file", "cells.h5ad"], 2, "--data-file: cannot be combined with --gene"),
        (["--data-file", "cells.h5ad", "--assay", "MERFISH"], 2, "--data-file: cannot be combined with --assay"),
        (["--data-file", "gone.h5ad"], 2, "gone.h5ad"),
        (["--data-file", "cells.h5ad", "--groupby", "type"], 1, "--groupby type: obs has no such column"),
        (["--gene", "LGALS1", "--groupby", "type"], 2, "--groupby: requires --data-file"),
        (["--gene", "LGALS1", "--targets", "targets.txt"], 2, "--targets: requires --sources"),
        (["--gene", "LGALS1", "--null", "20"], 2, "--null: requires --sources"),
        (["--sources", "sources.txt", "--null", "3"], 2, "--null 3: too few random sources"),
        (["--sources", "sources.txt", "--null", "400"], 2, "400 random sources, but only 303 genes"),
        (["--sources", "sources.txt", "--candidates", "targets.txt"], 2, "--sources: cannot be combined with --cand"),
        (["--sources", "gone.txt"], 2, "--sources gone.txt: no such file"),
        (["--gene", "LGALS1", "--candidates", "one.txt"], 2, "--candidates one.txt: probabilities of 1 genes"),
        (["--gene", "LGALS1", "--output-path", "x.csv"], 2, "--output-path x.csv: must end in .h5ad or .zarr"),
        (["--gene", "LGALS1", "--plot", "x.txt"], 2, "--plot x.txt: must end in .png, .pdf, .svg"),
        (["--gene", "LGALS1", "--plot", "x.png", "--output-path", "x.h5ad"], 2, "a heatmap needs at least two rows"),
        (
            ["--gene", "LGALS1", "--config-override", "model.data_config.normalize_to_scale=100"],
            2,
            "--gene: the checkpoint was trained on counts scaled to a cell's total",
        ),
        (["--gene", "LGALS1", "--config-override", "model.model_type=esm2ce"], 2, "the baseline predicts no genes"),
        (
            [
                *("--gene", "LGALS1", "--config-override"),
                f"model.inference_config.pretrained_embedding=['{SYNTHETIC / 'other_species_gene.h5'}']",
            ],
            2,
            "a new species has no gene head",
        ),
    ],
)
def test_bad_input_is_refused(options: list[str], exit_code: int, message: str, folder: Path) -> None:
    (folder / "bad.csv").write_text(f"genes\n{GENES[0]}\n{GENES[1]} {GENES[1]}\n")
    (folder / "one.txt").write_text(GENES[0])
    assert_refused(invoke(*options), exit_code, message, folder)


@pytest.mark.parametrize(
    ("options", "read"),
    [
        (
            ["--data-file", "cells.h5ad", "--groupby", "cell_type", "--output-path", "../{folder}/cells.h5ad"],
            "cells.h5ad",
        ),
        (["--data-file", "cell*.h5ad", "--output-path", "cells.h5ad"], "cells.h5ad"),
        (["--sources", "sources.txt", "--data-file", "cells.h5ad", "--output-path", "cells.h5ad"], "cells.h5ad"),
        (["--prompts", "list.h5ad", "--output-path", "list.h5ad"], "list.h5ad"),
        (["--gene", "LGALS1", "--candidates", "list.h5ad", "--output-path", "list.h5ad"], "list.h5ad"),
        (["--sources", "list.svg", "--plot", "list.svg"], "list.svg"),
        (["--sources", "sources.txt", "--targets", "list.svg", "--plot", "list.svg"], "list.svg"),
    ],
)
def test_an_input_is_not_overwritten(options: list[str], read: str, folder: Path) -> None:
    for name in ("list.h5ad", "list.svg"):
        (folder / name).write_text("\n".join(["genes", *GENES[:5]]))
    before = (folder / read).read_bytes()
    options = [option.format(folder=folder.name) for option in options]
    result = invoke(*options)
    assert result.exit_code == 2, result.output
    assert f"{read}: is also an input" in result.stderr
    assert (folder / read).read_bytes() == before


def test_a_checkpoint_without_gene_head_is_refused(folder: Path, checkpoint_copy: Path) -> None:
    result = invoke("--gene", "LGALS1", checkpoint=without_gene_head(checkpoint_copy))
    assert_refused(result, 1, "has no gene head; it was trained with gene_id_loss_weight 0", folder)
