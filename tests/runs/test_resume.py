"""An interrupted run resumes where it stopped, and only if it is the same run."""

import json
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata
import h5py
import pytest
import torch
from typer.testing import CliRunner, Result

from tests.commands import assert_same, finish, inference_command, read_result, run_command, start
from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import random_adata
from transcriptformer.checkpoint.published import load_config
from transcriptformer.cli.main import app
from transcriptformer.errors import OutputError
from transcriptformer.inference.run import run
from transcriptformer.runs.recording import MAX_PENDING_BATCHES

N_CELLS = 40


class InterruptedRunError(Exception):
    """Stands for anything that interrupts a run."""


@pytest.fixture
def interrupted(tmp_path: Path, checkpoint_copy: Path) -> Path:
    """A folder with an input, a checkpoint, and the intermediate results of a run interrupted halfway."""
    random_adata(N_CELLS).write_h5ad(tmp_path / "cells.h5ad")

    def end_halfway(n_done: int, n_cells: int) -> None:
        if n_done >= n_cells / 2:
            raise InterruptedRunError

    settings = {"precision": "32", "device": "cpu", "batch_size": 5, "output_path": str(tmp_path / "out")}
    config = load_config(checkpoint_copy, {f"model.inference_config.{key}": value for key, value in settings.items()})
    with pytest.raises(InterruptedRunError):
        run([tmp_path / "cells.h5ad"], checkpoint_copy, config, end_halfway)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["embeddings.h5ad.parts"]
    return tmp_path


def resume(folder: Path, *options: object) -> Result:
    fixed = [
        "inference",
        "--checkpoint-path",
        folder / "checkpoint",
        "--precision",
        "32",
        "--device",
        "cpu",
        "--resume",
    ]
    fixed += ["--data-file", folder / "cells.h5ad", "--output-path", folder / "out"]
    return CliRunner().invoke(app, [str(option) for option in [*fixed, *options]])


def uninterrupted(folder: Path) -> anndata.AnnData:
    settings = {"precision": "32", "device": "cpu", "output_path": str(folder / "uninterrupted")}
    config = load_config(CHECKPOINT, {f"model.inference_config.{key}": value for key, value in settings.items()})
    written = run([folder / "cells.h5ad"], CHECKPOINT, config)
    assert written is not None
    return read_result(written)


def assert_refused(result: Result, folder: Path, change: str) -> None:
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 1
    assert re.search(rf"--resume: .*embeddings\.h5ad\.parts contains a different run; changed: {change}", errors[0]), (
        errors[0]
    )
    assert result.stdout == ""
    assert [path.name for path in (folder / "out").iterdir()] == ["embeddings.h5ad.parts"]


def test_settings_that_do_not_affect_results_may_change(interrupted: Path) -> None:
    result = resume(interrupted, "--batch-size", 3, "--n-data-workers", 2, "--no-oom-dataloader")
    assert result.exit_code == 0, result.output
    assert f"{N_CELLS // 2 + 5 * MAX_PENDING_BATCHES} cells are already done" in result.stderr
    assert_same(read_result(interrupted / "out" / "embeddings.h5ad"), uninterrupted(interrupted))
    assert [path.name for path in (interrupted / "out").iterdir()] == ["embeddings.h5ad"]


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (["--clip-counts", 5], r"settings\.model\.data_config\.clip_counts was 30(\.0)?, is 5(\.0)?;"),
        (["--embedding-layer-index", 0], r"settings\.model\.inference_config\.embedding_layer_index was -1, is 0;"),
        (["--emb-type", "cge"], r"settings\.model\.inference_config\.emb_type was cell, is cge;"),
        (["--precision", "bf16-mixed"], r"settings\.model\.inference_config\.precision was 32, is bf16-mixed;"),
        (["--data-file", CHECKPOINT.parent / "cells.h5ad"], r"inputs\.1\.content was None, is [0-9a-f]{64};"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_changed_settings_are_refused_and_named(interrupted: Path, options: list[object], change: str) -> None:
    assert_refused(resume(interrupted, *options), interrupted, change)


def test_a_changed_input_is_refused_and_named(interrupted: Path) -> None:
    random_adata(N_CELLS, seed=1).write_h5ad(interrupted / "other.h5ad")
    (interrupted / "other.h5ad").replace(interrupted / "cells.h5ad")
    assert_refused(resume(interrupted), interrupted, r"inputs\.0\.content was [0-9a-f]{64}, is [0-9a-f]{64};")


def test_changed_content_of_the_same_size_and_date_is_detected(interrupted: Path) -> None:
    path = interrupted / "cells.h5ad"
    status = path.stat()
    with h5py.File(path, "r+") as file:
        file["X/data"][5] += 1
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert_refused(resume(interrupted), interrupted, r"inputs\.0\.content was [0-9a-f]{64}, is [0-9a-f]{64};")


def test_a_changed_date_of_the_same_content_does_not_matter(interrupted: Path) -> None:
    (interrupted / "cells.h5ad").touch()
    assert resume(interrupted).exit_code == 0


@pytest.mark.parametrize("vocabulary", ["genes", "metadata"])
def test_a_permuted_vocabulary_is_detected(interrupted: Path, vocabulary: str) -> None:
    if vocabulary == "genes":
        with h5py.File(interrupted / "checkpoint" / "vocabs" / "homo_sapiens_gene.h5", "r+") as file:
            file["keys"][...] = file["keys"][:][::-1]
    else:
        path = interrupted / "checkpoint" / "vocabs" / "assay_vocab.json"
        ids = json.loads(path.read_text())
        first, second = [name for name in ids if name != "unknown"][:2]
        ids[first], ids[second] = ids[second], ids[first]
        path.write_text(json.dumps(ids))
    assert_refused(
        resume(interrupted), interrupted, rf"checkpoint\.{vocabulary} was [0-9a-f]{{64}}, is [0-9a-f]{{64}};"
    )


def test_an_input_that_changes_while_it_is_read_gives_no_result(tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    random_adata(N_CELLS).write_h5ad(path)

    def change_halfway(n_done: int, n_cells: int) -> None:
        if N_CELLS / 2 <= n_done < N_CELLS / 2 + 5:
            random_adata(N_CELLS, seed=1).write_h5ad(tmp_path / "other.h5ad")
            (tmp_path / "other.h5ad").replace(path)

    settings = {"precision": "32", "device": "cpu", "batch_size": 5, "output_path": str(tmp_path / "out")}
    config = load_config(CHECKPOINT, {f"model.inference_config.{key}": value for key, value in settings.items()})
    with pytest.raises(OutputError, match=rf"an input changed while it was read \({path}\); the results are deleted"):
        run([path], CHECKPOINT, config, change_halfway)
    assert list((tmp_path / "out").iterdir()) == [], "a resumed run would use what is left"


def test_a_changed_checkpoint_is_refused_and_named(interrupted: Path) -> None:
    path = interrupted / "checkpoint" / "model_weights.pt"
    weights = torch.load(path)
    torch.save({name: 2 * weight for name, weight in weights.items()}, path)
    assert_refused(resume(interrupted), interrupted, r"checkpoint\.weights was [0-9a-f]{64}, is [0-9a-f]{64};")


def test_without_the_option_intermediate_results_are_not_modified(interrupted: Path) -> None:
    parts = interrupted / "out" / "embeddings.h5ad.parts"
    before = {path: path.read_bytes() for path in parts.iterdir()}
    settings = {"precision": "32", "device": "cpu", "output_path": str(interrupted / "out")}
    config = load_config(CHECKPOINT, {f"model.inference_config.{key}": value for key, value in settings.items()})
    with pytest.raises(Exception, match=r"contains results of an earlier run; add --resume"):
        run([interrupted / "cells.h5ad"], CHECKPOINT, config)
    assert {path: path.read_bytes() for path in parts.iterdir()} == before


def test_with_nothing_to_resume_a_new_run_starts(tmp_path: Path, checkpoint_copy: Path) -> None:
    random_adata(N_CELLS).write_h5ad(tmp_path / "cells.h5ad")
    result = resume(tmp_path)
    assert result.exit_code == 0, result.output
    assert "already done" not in result.stderr
    assert_same(read_result(tmp_path / "out" / "embeddings.h5ad"), uninterrupted(tmp_path))


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_a_complete_result_is_not_rewritten(tmp_path: Path, checkpoint_copy: Path, ending: str) -> None:
    random_adata(N_CELLS).write_h5ad(tmp_path / "cells.h5ad")
    assert resume(tmp_path, "--output-filename", f"x.{ending}").exit_code == 0
    output = tmp_path / "out" / f"x.{ending}"
    before = output.stat()
    again = resume(tmp_path, "--output-filename", f"x.{ending}", "--batch-size", 2)
    assert again.exit_code == 0, again.output
    assert f"{output} is already complete" in again.stderr
    assert again.stdout == f"{N_CELLS} cells: obsm['embeddings'] ({N_CELLS}, 32) in {output}\n"
    assert (output.stat().st_ino, output.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    other = resume(tmp_path, "--output-filename", f"x.{ending}", "--clip-counts", 5)
    assert "already complete" not in other.stderr
    assert output.stat().st_ino != before.st_ino


def test_a_run_killed_during_cleanup_is_complete(interrupted: Path) -> None:
    parts = interrupted / "out" / "embeddings.h5ad.parts"
    left = [path for path in parts.iterdir() if path.name != "run.json"]  # deleted first
    contents = {path: path.read_bytes() for path in left}
    assert resume(interrupted).exit_code == 0
    parts.mkdir()
    for path, content in contents.items():
        path.write_bytes(content)
    again = resume(interrupted)
    assert again.exit_code == 0, again.output
    assert "is already complete" in again.stderr
    assert [path.name for path in (interrupted / "out").iterdir()] == ["embeddings.h5ad"]


@pytest.mark.parametrize("cge_pool", ["gene", "assay"])
def test_pooled_runs_resume_too(cge_pool: str, tmp_path: Path, checkpoint_copy: Path) -> None:
    random_adata(N_CELLS).write_h5ad(tmp_path / "cells.h5ad")
    settings = {"precision": "32", "device": "cpu", "emb_type": "cge", "cge_pool": cge_pool, "batch_size": 7}
    config = {f"model.inference_config.{key}": value for key, value in settings.items()}

    def end_early(n_done: int, n_cells: int) -> None:
        if n_done:
            raise InterruptedRunError

    for name in ("out", "uninterrupted"):
        options = {**config, "model.inference_config.output_path": str(tmp_path / name)}
        if name == "out":
            with pytest.raises(InterruptedRunError):
                run([tmp_path / "cells.h5ad"], checkpoint_copy, load_config(checkpoint_copy, options), end_early)
            result = resume(tmp_path, "--emb-type", "cge", "--cge-pool", cge_pool, "--batch-size", 4)
            assert f"{7 + 7 * MAX_PENDING_BATCHES} cells are already done" in result.stderr
        else:
            run([tmp_path / "cells.h5ad"], checkpoint_copy, load_config(checkpoint_copy, options))
    results = [read_result(tmp_path / name / "embeddings.h5ad") for name in ("out", "uninterrupted")]
    assert_same(*results)


MANY_CELLS = 8000
"""In batches of one, they take long enough for several flushes."""


@pytest.fixture(scope="module")
def many_cells(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], anndata.AnnData, float]:
    """A command, its uninterrupted result and its duration in seconds."""
    folder = tmp_path_factory.mktemp("many")
    random_adata(MANY_CELLS, density=0.4).write_h5ad(folder / "cells.h5ad")
    options: list[object] = ["--data-file", folder / "cells.h5ad", "--batch-size", 1]
    started = time.monotonic()
    done = run_command(*options, "--output-path", folder)
    assert done.returncode == 0, done.stderr
    return options, read_result(folder / "embeddings.h5ad"), time.monotonic() - started


@contextmanager
def never_incomplete(path: Path) -> Iterator[None]:
    """Check continuously that the file, if present, has all cells."""
    stopped, problems = threading.Event(), []

    def look() -> None:
        while not stopped.wait(0.02):
            if path.exists():
                try:
                    with h5py.File(path) as file:
                        assert file["obsm/embeddings"].shape == (MANY_CELLS, 32)
                        assert file["uns/transcriptformer/run"][()]
                except Exception as error:
                    problems.append(error)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        stopped.set()
        watcher.join()
    assert problems == []


@pytest.mark.slow
def test_a_run_killed_at_any_time_resumes_to_the_same_result(
    many_cells: tuple[list[object], anndata.AnnData, float], tmp_path: Path
) -> None:
    options, expected, seconds = many_cells
    rng, kept = random.Random(0), []
    for i in range(20):
        folder = tmp_path / str(i)
        with never_incomplete(folder / "embeddings.h5ad"):
            run_command(*options, "--output-path", folder, kill_after=seconds * (i + rng.random()) / 20)
            done = run_command(*options, "--output-path", folder, "--resume")
        assert done.returncode == 0, done.stderr
        found = re.search(r"(\d+) cells are already done", done.stderr)
        kept.append(int(found[1]) if found else 0)
        assert_same(read_result(folder / "embeddings.h5ad"), expected)
    assert max(kept) > MANY_CELLS / 2, kept


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no permission to mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def resize(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)


def kilobytes_of(folder: Path) -> int:
    return sum(path.stat().st_blocks for path in folder.rglob("*")) // 2


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk")
def test_a_run_ended_by_a_full_disk_resumes_with_more_space(
    many_cells: tuple[list[object], anndata.AnnData, float], small_disk: Path
) -> None:
    options, expected, _ = many_cells
    process = start(inference_command(*options, "--output-path", small_disk))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(small_disk.glob("*.parts/piece-*")):
        time.sleep(0.05)
    process.terminate()
    assert finish(process, kill_after=30).returncode == 143
    resize(small_disk, kilobytes_of(small_disk) + 24)
    full = run_command(*options, "--output-path", small_disk, "--resume")
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    errors = [line for line in full.stderr.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 1
    assert re.search(r"embeddings\.h5ad\.parts: results cannot be written \(No space left on device\)", errors[0])
    assert re.search(rf"INFO: \d+ of {MANY_CELLS} cells are kept", full.stderr)
    assert [path.name for path in small_disk.iterdir()] == ["embeddings.h5ad.parts"]
    resize(small_disk, 5000)
    done = run_command(*options, "--output-path", small_disk, "--resume")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ cells are already done", done.stderr)
    assert_same(read_result(small_disk / "embeddings.h5ad"), expected)
