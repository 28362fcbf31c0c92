"""Cell names made unique: in memory, streamed, resumed, and of several inputs."""

from pathlib import Path

import anndata
import numpy as np
import pytest
from typer.testing import CliRunner

import transcriptformer as tf
from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import random_adata
from transcriptformer.cli.main import app
from transcriptformer.runs import inputs
from transcriptformer.runs.cell_names import UniqueNames, stems_of, with_stem

SETTING = "model.inference_config.make_names_unique"


def renamed(*names: str, block: int = 2) -> list[str]:
    blocks = [np.array(names[i : i + block], object) for i in range(0, len(names), block)]
    unique = UniqueNames(blocks)
    return [name for i, part in enumerate(blocks) for name in unique.rename(part, i * block)]


def test_running_numbers_make_repeated_names_unique() -> None:
    assert renamed("a", "b", "a", "a", "c") == ["a", "b", "a-1", "a-2", "c"]


@pytest.mark.parametrize("block", [1, 2, 100])
def test_numbers_that_make_another_name_are_skipped(block: int) -> None:
    found = renamed("a", "a-1", "a", "a", "a-1", "a-1-1", "a-4", block=block)
    assert found[:2] == ["a", "a-1"]
    assert found[5:] == ["a-1-1", "a-4"]
    assert len(set(found)) == 7
    assert all(name.startswith("a") for name in found)


def test_names_of_random_collisions_are_unique() -> None:
    names = np.random.default_rng(0).choice(["a", "a-1", "a-2", "a-1-1", "b", "b-7"], 500)
    assert len(set(renamed(*names, block=7))) == 500


@pytest.mark.parametrize(
    ("source", "stem"),
    [
        ("runs/day 1.h5ad", "day 1"),
        ("runs/day 1.h5ad.gz", "day 1"),
        (Path("x.zarr/"), "x"),
        ("s3://bucket/a.b.zarr", "a.b"),
        ("https://host/x.zarr?signature=1/2.h5ad", "x"),
        ("caf\udce9.h5ad", "caf?"),
        (anndata.AnnData(), None),
    ],
)
def test_the_stem_is_the_name_of_the_input(source: str | Path | anndata.AnnData, stem: str | None) -> None:
    assert stems_of([source]) == [stem]


@pytest.mark.parametrize(
    ("sources", "stems"),
    [
        (["runs/a.h5ad", "runs/b.h5ad"], ["a", "b"]),
        (["runs/one/counts.h5", "runs/two/counts.h5", "runs/other.h5"], ["one_counts", "two_counts", "other"]),
        (["1/x/full.h5ad", "2/x/full.h5ad", "2/y/full.h5ad"], ["1_x_full", "2_x_full", "y_full"]),
        (["a.h5ad", "a.h5ad"], ["a", "a"]),
        ([anndata.AnnData(), "a.h5ad"], [None, "a"]),
    ],
)
def test_stems_that_repeat_are_told_apart_by_their_folders(
    sources: list[str | anndata.AnnData], stems: list[str | None]
) -> None:
    assert stems_of(sources) == stems


def embed_files(folder: Path, *options: str, name: str = "embeddings.h5ad") -> list[str]:
    files = [option for file in ("day1", "day2") for option in ("--data-file", str(folder / f"{file}.h5ad"))]
    fixed = ["inference", "--checkpoint-path", str(CHECKPOINT), "--precision", "32", "--device", "cpu"]
    where = ["--output-path", str(folder), "--output-filename", name]
    result = CliRunner().invoke(app, [*fixed, *files, *where, *options])
    assert result.exit_code == 0, result.output
    return result.stderr.splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, n_cells in enumerate((5, 3), start=1):
        adata = random_adata(n_cells, seed=i)
        adata.obs_names = ["c0", "c0", *adata.obs_names[2:]]
        with anndata.settings.override(check_uniqueness=False):
            adata.write_h5ad(tmp_path / f"day{i}.h5ad")
    return tmp_path


EXPECTED = ["c0-day1", "c0-day1-1", "c2-day1", "c3-day1", "c4-day1", "c0-day2", "c0-day2-1", "c2-day2"]


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
@pytest.mark.parametrize("name", ["embeddings.h5ad", "embeddings.zarr"])
def test_written_names_are_unique(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "BLOCK_SIZE", 2)
    lines = embed_files(folder, "--make-names-unique", name=name)
    read = anndata.read_zarr if name.endswith("zarr") else anndata.read_h5ad
    assert read(folder / name).obs_names.tolist() == EXPECTED
    assert not [line for line in lines if line.startswith("WARNING")]
    assert embed_files(folder, "--make-names-unique", "--resume", name=name)[-1].endswith("is already complete")


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_without_the_option_names_stay_and_the_warning_suggests_it(folder: Path) -> None:
    (warning,) = [line for line in embed_files(folder) if line.startswith("WARNING")]
    assert warning.startswith("WARNING: 4 cell names are not unique; add --make-names-unique")
    assert anndata.read_h5ad(folder / "embeddings.h5ad").obs_names.tolist()[:2] == ["c0", "c0"]


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_names_are_unique_in_memory(folder: Path) -> None:
    model = tf.load(CHECKPOINT, device="cpu", precision="32", settings={SETTING: True})
    result = tf.embed([folder / "day1.h5ad", folder / "day2.h5ad"], model)
    assert result is not None
    assert result.obs_names.tolist() == EXPECTED


def test_pooled_genes_have_no_cell_names(folder: Path) -> None:
    options = ["--emb-type", "cge", "--cge-pool", "gene", "--make-names-unique"]
    result = CliRunner().invoke(
        app,
        ["inference", "--checkpoint-path", str(CHECKPOINT), "--data-file", str(folder / "day1.h5ad"), *options],
    )
    assert result.exit_code == 2
    assert "has no effect with --cge-pool" in result.stderr


def test_stems_are_appended_to_text_of_any_kind() -> None:
    index = anndata.AnnData(np.zeros((2, 1))).obs_names.astype("string")
    assert with_stem(index, "x").tolist() == ["0-x", "1-x"]
    assert with_stem(index, None).tolist() == ["0", "1"]
