"""`transcriptformer check`: what it tells, and that it refuses what `inference` refuses."""

import json
import logging
import shlex
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.golden_cases import CELLS, CHECKPOINT, SYNTHETIC
from tests.h5ad_files import GENES, make_adata, random_adata
from transcriptformer.cli.main import app
from transcriptformer.data.store import Store
from transcriptformer.inference.check import check as check_files


def check(*arguments: object, checkpoint: Path | None = CHECKPOINT) -> Result:
    options = ["--checkpoint-path", checkpoint, "--precision", "32", "--device", "cpu"] if checkpoint else []
    return CliRunner().invoke(app, ["check", *map(str, [*arguments, *options])], env={"COLUMNS": "200"})


def report(*arguments: object, checkpoint: Path | None = CHECKPOINT) -> dict[str, Any]:
    result = check(*arguments, "--json", checkpoint=checkpoint)
    (only,) = json.loads(result.stdout)["files"]
    assert result.exit_code == (0 if only["refused"] is None else 1)
    return only


def test_the_synthetic_cells_are_described() -> None:
    found = report(CELLS)
    assert found["refused"] is None
    assert (found["cells"], found["cells_kept"], found["cells_empty"], found["cells_too_long"]) == (24, 24, 1, 3)
    assert (found["genes"], found["genes_known"], found["species"]) == (340, 305, "homo_sapiens")
    assert found["whole_numbers"] is True
    assert found["unseen_share"] == pytest.approx(0.159, abs=0.001)
    assert found["unknown_values"] == {"assay": {"a new assay": 8}}
    assert found["memory_gib"] > 0.5
    assert found["seconds"] > 0


def test_the_same_is_a_table_for_people() -> None:
    result = check(CELLS)
    assert result.exit_code == 0
    for text in (
        "305 (89.7 % of the file's genes)",
        "likely homo_sapiens",
        "'a new assay' (8 cells",
        "would accept it",
    ):
        assert text in result.stdout


def test_a_file_tells_something_without_a_checkpoint() -> None:
    found = report(CELLS, checkpoint=None)
    assert (found["cells"], found["genes"], found["species"]) == (24, 340, "homo_sapiens")
    assert found["genes_known"] is None
    assert found["mean_genes_per_cell"] > 100
    assert check(CELLS, "--batch-size", 4, checkpoint=None).exit_code == 2


def test_another_species_is_named_and_accepted_with_its_protein_embeddings() -> None:
    other = SYNTHETIC / "other_species.h5ad"
    found = report(other)
    assert found["species"] == "mus_musculus"
    assert found["genes_known"] == 0
    assert "the cells may be of another species (mus_musculus)" in found["refused"]
    found = report(other, "--pretrained-embedding", SYNTHETIC / "other_species_gene.h5")
    assert found["refused"] is None
    assert found["genes_known"] > 200


def test_what_inference_would_refuse_is_exit_code_1(tmp_path: Path) -> None:
    make_adata([[1, np.nan]]).write_h5ad(tmp_path / "nan.h5ad")
    make_adata([[1, 2]], genes=[f"{GENES[0]}.1", f"{GENES[0]}.2"]).write_h5ad(tmp_path / "repeated.h5ad")
    make_adata([[1, 2]], genes=["TP53", "BRCA1"]).write_h5ad(tmp_path / "symbols.h5ad")
    (tmp_path / "broken.h5ad").write_bytes(CELLS.read_bytes()[:5000])
    for name, reason in {
        "nan.h5ad": "counts are NaN",
        "repeated.h5ad": "1 columns have duplicate gene ids",
        "symbols.h5ad": "these look like gene symbols",
        "broken.h5ad": "truncated or damaged",
        "nowhere.h5ad": "no such file",
    }.items():
        assert reason in report(tmp_path / name)["refused"], name
    assert "NaN" in report(tmp_path / "nan.h5ad", checkpoint=None)["refused"]
    assert report(tmp_path / "repeated.h5ad")["repeated_genes"] == 1
    assert report(tmp_path / "repeated.h5ad", "--remove-duplicate-genes")["refused"] is None


def test_one_bad_file_among_several_does_not_hide_the_others(tmp_path: Path) -> None:
    random_adata(3).write_h5ad(tmp_path / "good.h5ad")
    result = check(tmp_path / "nowhere.h5ad", tmp_path / "good.h5ad", "--json")
    assert result.exit_code == 1
    bad, good = json.loads(result.stdout)["files"]
    assert "no such file" in bad["refused"]
    assert good["refused"] is None


def test_one_command_embeds_all_files_with_the_same_options(tmp_path: Path) -> None:
    repeated = make_adata([[1, 2]], genes=[GENES[0], GENES[0]])
    repeated.obs_names = ["another"]
    repeated.write_h5ad(tmp_path / "a cell.h5ad")
    random_adata(3).write_h5ad(tmp_path / "b.h5ad")
    options = ["--duplicate-genes", "sum", "--config-override", "model.data_config.block_size=2"]
    result = check(tmp_path / "*.h5ad", *options, "--json")
    command = json.loads(result.stdout)["command"]
    assert check(tmp_path / "*.h5ad", *options).stdout.splitlines()[-1] == command
    program, *words = shlex.split(command)
    assert program == "transcriptformer"
    assert words.count("--data-file") == 2
    assert CliRunner().invoke(app, [*words, "--output-path", str(tmp_path / "output")]).exit_code == 0
    assert len(anndata.read_h5ad(tmp_path / "output" / "embeddings.h5ad")) == 4


def test_without_a_checkpoint_the_command_leaves_its_place() -> None:
    assert check(CELLS, checkpoint=None).stdout.splitlines()[-1].endswith(f"-path CHECKPOINT --data-file {CELLS}")


def test_no_command_would_embed_a_refused_file(tmp_path: Path) -> None:
    files = [CELLS, tmp_path / "nowhere.h5ad"]
    assert json.loads(check(*files, "--json").stdout)["command"] is None
    assert "transcriptformer inference" not in check(*files).stdout


def test_columns_of_different_kinds_fit_together(tmp_path: Path) -> None:
    for i, value in enumerate(["young", 3.5]):
        adata = random_adata(3)
        adata.obs["age"] = value
        adata.write_h5ad(tmp_path / f"{i}.h5ad")
    result = check(tmp_path / "0.h5ad", tmp_path / "1.h5ad", "--json")
    assert result.exit_code == 0, result.stdout
    assert [file["refused"] for file in json.loads(result.stdout)["files"]] == [None, None]


def test_doubtful_counts_and_names_are_told(tmp_path: Path) -> None:
    adata = make_adata([[1.5, 2], [1, 1]])
    adata.obs_names = ["twice", "twice"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    found = report(tmp_path / "cells.h5ad")
    assert found["refused"] is None
    assert found["whole_numbers"] is False
    assert found["repeated_cell_names"] == 1


def write_doubtful_cells(folder: Path) -> dict[str, list[str]]:
    """Write files to warn about, and return words of the warnings."""
    two_species = [*GENES[:195], *(f"ENSMUSG{i:011d}" for i in range(5))]
    make_adata(np.ones((2, 200)), genes=two_species).write_h5ad(folder / "species.h5ad")
    make_adata([[1.5, 2], [1, 1]]).write_h5ad(folder / "normalized.h5ad")
    make_adata(np.ones((2, 20)), genes=[GENES[0], *(f"ENSG999{i:08d}" for i in range(19))]).write_h5ad(
        folder / "few.h5ad"
    )
    unlike = random_adata(3)
    unlike.layers["counts"] = 2 * unlike.X
    del unlike.obs["assay"]
    unlike.write_h5ad(folder / "unlike.h5ad")
    return {
        "species.h5ad": ["genes of several species: homo_sapiens (195 genes, 390 counts, 97.5 %), mus_musculus"],
        "normalized.h5ad": ["counts are not integers; the model expects raw counts"],
        "few.h5ad": ["only 1 of 20 genes (5.0 %) are in the checkpoint's vocabulary"],
        "unlike.h5ad": [".X and layers['counts'] hold different whole numbers; taking .X", "obs has no column 'assay'"],
    }


def test_warnings_about_a_file_are_in_its_report_only(tmp_path: Path) -> None:
    expected = write_doubtful_cells(tmp_path)
    files = [tmp_path / name for name in expected]
    result = check(*files, "--json")
    assert result.stderr == ""
    for file, found in zip(files, json.loads(result.stdout)["files"], strict=True):
        starts = [f"{file}: {words}" for words in expected[file.name]]
        assert [warning[: len(start)] for warning, start in zip(found["warnings"], starts, strict=True)] == starts
    table = check(*files)
    assert table.stderr == ""
    for start in (start for starts in expected.values() for start in starts):
        assert table.stdout.count(start) == 1


def test_warnings_about_a_file_need_no_checkpoint(tmp_path: Path) -> None:
    write_doubtful_cells(tmp_path)
    (warning,) = report(tmp_path / "species.h5ad", checkpoint=None)["warnings"]
    assert "genes of several species" in warning
    assert check(tmp_path / "normalized.h5ad", checkpoint=None).stderr == ""


def test_what_a_row_tells_is_not_a_warning_too(tmp_path: Path) -> None:
    make_adata([[1, 2]], genes=[GENES[0], GENES[0]]).write_h5ad(tmp_path / "repeated.h5ad")
    for policy in ("first", "sum", "error"):
        result = check(tmp_path / "repeated.h5ad", "--duplicate-genes", policy)
        assert "repeated gene ids" in result.stdout
        assert "warning" not in result.stdout
        assert result.stderr == ""


def test_missing_values_are_a_row_and_unknown_ones_a_warning(tmp_path: Path) -> None:
    adata = random_adata(3)
    adata.obs["assay"] = ["10x multiome", "unheard of", None]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    found = report(tmp_path / "cells.h5ad")
    assert found["unknown_values"] == {"assay": {"unheard of": 1, "missing": 1}}
    result = check(tmp_path / "cells.h5ad")
    assert result.stdout.count("unheard of") == 1
    assert "missing assay" in result.stdout


def test_warnings_about_files_together_are_in_each_report(tmp_path: Path) -> None:
    for name, age in (("a.h5ad", "young"), ("b.h5ad", 3.5)):
        adata = random_adata(3)
        adata.obs["age"] = age
        adata.obs["assay"] = name
        adata.write_h5ad(tmp_path / name)
    result = check(tmp_path / "a.h5ad", tmp_path / "b.h5ad", "--json")
    assert result.stderr == ""
    for found in json.loads(result.stdout)["files"]:
        own, together = found["warnings"]
        assert own.startswith(f"{found['file']}: unknown assay: '{Path(found['file']).name}'")
        assert together.startswith("together with the other files: obs: column 'age' contains")


def test_python_gets_the_same_reports_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    expected = write_doubtful_cells(tmp_path)
    files = [tmp_path / name for name in expected]
    ours = logging.getLogger("transcriptformer")
    before = ours.level, list(ours.handlers), ours.propagate
    reports = check_files(files, CHECKPOINT, {"model.inference_config.device": "cpu"})
    assert [len(found.warnings) for found in reports] == list(map(len, expected.values()))
    assert (ours.level, ours.handlers, ours.propagate) == before
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_warnings_about_the_checkpoint_are_printed(checkpoint_copy: Path) -> None:
    path = checkpoint_copy / "config.json"
    config = json.loads(path.read_text())
    config["model"]["model_config"]["flux_capacitor"] = 1
    path.write_text(json.dumps(config))
    result = check(CELLS, "--json", checkpoint=checkpoint_copy)
    assert result.stderr.startswith(f"WARNING: {path}: ignoring unknown key model.model_config.flux_capacitor")
    (found,) = json.loads(result.stdout)["files"]
    assert "flux_capacitor" not in str(found["warnings"])


def test_bad_options_are_usage_errors() -> None:
    assert check(CELLS, "--config-override", "model.data_config.clip_count=3").exit_code == 2
    assert check(CELLS, checkpoint=Path("nowhere")).exit_code == 2
    assert check(CELLS, "--duplicate-genes", "bogus", checkpoint=None).exit_code == 2


def test_every_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_store(location: Any, allow_external: bool) -> Store:
        opened.append(Path(location).name)
        return Store(location, allow_external)

    monkeypatch.setattr("transcriptformer.data.formats.Store", open_store)
    random_adata(3).write_h5ad(tmp_path / "cells.h5ad")
    make_adata([[1, 2]], genes=["TP53", "BRCA1"]).write_h5ad(tmp_path / "symbols.h5ad")
    make_adata([[1, 2]], genes=[GENES[0], GENES[0]]).write_h5ad(tmp_path / "repeated.h5ad")
    names = ["cells.h5ad", "symbols.h5ad", "repeated.h5ad"]
    for files, checkpoint in ((names, CHECKPOINT), (names, None), (["cells.h5ad", str(CELLS)], CHECKPOINT)):
        opened.clear()
        check(*(tmp_path / name for name in files), checkpoint=checkpoint)
        assert opened == [Path(name).name for name in files]
