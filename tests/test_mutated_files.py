"""Damaged files give one ERROR line or the correct result, never a traceback, crash or hang.

Each file is embedded by the command, in a forked process. A result is correct if it equals that of the undamaged file,
or that of what anndata reads from the damaged file.
"""

import importlib
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import anndata
import pytest
from typer.testing import CliRunner

from tests.commands import assert_same, read_result
from tests.forked import run_forked
from tests.golden_cases import CHECKPOINT
from tests.mutated_files import LAYOUTS, mutate
from transcriptformer.cli.main import app

importlib.import_module("transcriptformer.inference.run")  # before forking

SECONDS = 20

N_FAST, N_SLOW, N_PER_TEST = 2, 100, 25
"""Seeds per layout in `make test` and in `make test-all`, and seeds per test of the latter."""

REGRESSION_SEEDS: Mapping[str, tuple[int, ...]] = {
    "csr.h5ad": (0, 11, 42, 50, 56, 62, 64),
    "dense.h5ad": (4, 6, 11, 24, 28, 38, 40, 68, 91, 95),
    "gzip.h5ad": (3, 14, 26, 39),
    "v2.zarr": (1, 5, 28, 40, 58, 64, 75, 82, 85),
    "v3.zarr": (9, 16, 19, 21, 28, 38, 41, 56, 61, 68, 70, 74, 75, 84, 90),
}
"""Seeds whose files once caused a traceback or a hang, or gave a result although anndata refuses them."""


def run_inference(source: Path, folder: Path) -> list[str]:
    """Embed a file into the folder and return the ERROR lines: one if there is no result, else none."""
    os.chdir(folder)
    options = ("--precision", "32", "--device", "cpu", "--output-path", folder)
    command = ["inference", "--checkpoint-path", CHECKPOINT, "--data-file", source, *options]
    result = CliRunner().invoke(app, [str(part) for part in command])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == (result.exit_code != 0), result.stderr
    assert "Traceback" not in result.output
    assert "internal error" not in result.output
    assert (folder / "embeddings.h5ad").exists() == (result.exit_code == 0)
    assert not any(path.name.endswith((".tmp", ".parts")) for path in folder.iterdir())
    return errors


def read_by_anndata(source: Path, folder: Path) -> None:
    """Embed what anndata reads from a file, rewritten as an undamaged file."""
    cells = anndata.read_zarr(source) if source.suffix == ".zarr" else anndata.read_h5ad(source)
    cells.write_h5ad(folder / "cells.h5ad")
    assert run_inference(folder / "cells.h5ad", folder) == []


def is_same(result: Path, expected: Path) -> bool:
    try:
        assert_same(read_result(result), read_result(expected))
    except AssertionError:
        return False
    return True


class Bench:
    """Undamaged files and their results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for layout, write in LAYOUTS.items():
            write(folder / layout)
            (folder / f"{layout}.result").mkdir()
            outcome = run_forked(partial(run_inference, folder / layout, folder / f"{layout}.result"), SECONDS)
            assert outcome.value == [], outcome

    def examine(self, layout: str, seed: int) -> tuple[str, str]:
        """Return the verdict on a damaged file, and a description of the damage."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        damage = mutate(self.folder / layout, folder / layout, seed)
        outcome = run_forked(partial(run_inference, folder / layout, folder), SECONDS)
        if outcome.failure:
            return f"failed: {outcome.failure}", damage
        if outcome.value:
            return "refused", damage
        if is_same(folder / "embeddings.h5ad", self.folder / f"{layout}.result" / "embeddings.h5ad"):
            return "unaffected", damage
        other = folder / "by_anndata"
        other.mkdir()
        outcome = run_forked(partial(read_by_anndata, folder / layout, other), SECONDS)
        if outcome.failure:
            return f"a result, but anndata failed: {outcome.failure}", damage
        is_correct = is_same(folder / "embeddings.h5ad", other / "embeddings.h5ad")
        return "same as anndata" if is_correct else "a result that differs from what anndata reads", damage


GOOD = {"refused", "unaffected", "same as anndata"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("mutated"))


def examine_all(bench: Bench, layout: str, seeds: range | tuple[int, ...]) -> None:
    verdicts: Counter[str] = Counter()
    for seed in seeds:
        verdict, damage = bench.examine(layout, seed)
        verdicts[verdict] += 1
        assert verdict in GOOD, f"{layout} with seed {seed}, {damage}: {verdict}"
    print(f"{layout}: {dict(verdicts)}")  # noqa: T201  (shown by pytest -s)


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*zarr:UserWarning"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata"),
]


@pytest.mark.parametrize("layout", ["csr.h5ad", "v3.zarr"])
def test_some_regressions(bench: Bench, layout: str) -> None:
    examine_all(bench, layout, REGRESSION_SEEDS[layout][-N_FAST:])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_regressions(bench: Bench, layout: str) -> None:
    examine_all(bench, layout, REGRESSION_SEEDS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, N_SLOW, N_PER_TEST))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_damaged_files_are_refused_or_read_correctly(bench: Bench, layout: str, start: int) -> None:
    examine_all(bench, layout, range(start, start + N_PER_TEST))
