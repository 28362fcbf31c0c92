"""Damaged files: one ERROR line, or exactly the right result; no traceback, no crash, no hang.

Each file is embedded by the command, in a fork of this process. A result is right if it is that of the file without
damage, or that of what anndata reads from the damaged file.
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

importlib.import_module("transcriptformer.inference.run")  # now, so that no fork has to

SECONDS = 20

N_FEW, N_ALL, N_AT_ONCE = 2, 100, 25
"""Seeds for each layout: in `make test`, in `make test-all`, and in one test of the latter."""

FAILED_ONCE: Mapping[str, tuple[int, ...]] = {
    "csr.h5ad": (0, 11, 42, 50, 56, 62, 64),
    "dense.h5ad": (4, 6, 11, 24, 28, 38, 40, 68, 91, 95),
    "gzip.h5ad": (3, 14, 26, 39),
    "v2.zarr": (1, 5, 28, 40, 58, 64, 75, 82, 85),
    "v3.zarr": (9, 16, 19, 21, 28, 38, 41, 56, 61, 68, 70, 74, 75, 84, 90),
}
"""Seeds whose files made a traceback or a hang, or were answered where anndata refuses them."""


def run_inference(source: Path, folder: Path) -> list[str]:
    """Embed a file into the folder; the ERROR lines, which are one if there is no result."""
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
    """Embed what anndata reads from a file, by way of a file without damage."""
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
    """Files without damage, and their results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for layout, write in LAYOUTS.items():
            write(folder / layout)
            (folder / f"{layout}.result").mkdir()
            outcome = run_forked(partial(run_inference, folder / layout, folder / f"{layout}.result"), SECONDS)
            assert outcome.value == [], outcome

    def examine(self, layout: str, seed: int) -> tuple[str, str]:
        """A verdict, which is bad if it is long, and what the damage was."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        damage = mutate(self.folder / layout, folder / layout, seed)
        outcome = run_forked(partial(run_inference, folder / layout, folder), SECONDS)
        if outcome.trouble:
            return f"trouble: {outcome.trouble}", damage
        if outcome.value:
            return "refused", damage
        if is_same(folder / "embeddings.h5ad", self.folder / f"{layout}.result" / "embeddings.h5ad"):
            return "unharmed", damage
        other = folder / "by_anndata"
        other.mkdir()
        outcome = run_forked(partial(read_by_anndata, folder / layout, other), SECONDS)
        if outcome.trouble:
            return f"an answer, but of anndata: {outcome.trouble}", damage
        is_right = is_same(folder / "embeddings.h5ad", other / "embeddings.h5ad")
        return "as anndata reads it" if is_right else "another answer than what anndata reads", damage


GOOD = {"refused", "unharmed", "as anndata reads it"}


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
def test_some_files_that_were_answered_badly_once(bench: Bench, layout: str) -> None:
    examine_all(bench, layout, FAILED_ONCE[layout][-N_FEW:])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_that_were_answered_badly_once(bench: Bench, layout: str) -> None:
    examine_all(bench, layout, FAILED_ONCE[layout])


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, N_ALL, N_AT_ONCE))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_damaged_files_are_refused_or_read_right(bench: Bench, layout: str, start: int) -> None:
    examine_all(bench, layout, range(start, start + N_AT_ONCE))
