"""Damaged intermediate files are recomputed or refused in one line; results are never wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.commands import assert_same, read_result
from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import random_adata
from tests.storage.test_lock import held_by_another
from tests.training.training_runs import assert_same_run, config_of, write_cells
from transcriptformer.checkpoint.published import load_config
from transcriptformer.cli.main import app
from transcriptformer.errors import CheckpointError, TranscriptFormerError, UsageError
from transcriptformer.inference.run import run
from transcriptformer.training.run import fit

N_CELLS = 40

DAMAGES = ("flipped", "cut", "emptied", "deleted", "replaced")


class EndedError(Exception):
    """Any exception that ends a run."""


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    elif how == "deleted":
        path.unlink()
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "emptied": b"", "replaced": b"of another program"}[how])


@pytest.fixture(autouse=True)
def _keep_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transcriptformer.storage.results.FLUSH_SECONDS", 0)
    monkeypatch.setattr("transcriptformer.runs.pooling.FLUSH_SECONDS", 0)


def options_for(folder: Path, kind: str) -> dict[str, object]:
    options: dict[str, object] = {"precision": "32", "device": "cpu", "batch_size": 5, "output_path": str(folder)}
    of_kind = {"cell": {}, "cge": {"emb_type": "cge"}, "pooled": {"emb_type": "cge", "cge_pool": "gene"}}[kind]
    return {f"model.inference_config.{key}": value for key, value in {**options, **of_kind}.items()}


def end_halfway(n_done: int, n_cells: int) -> None:
    if n_done >= n_cells / 2:
        raise EndedError


def resume(folder: Path, kind: str) -> Result:
    overrides = {**options_for(folder, kind), "model.inference_config.resume": True}
    options = [part for key, value in overrides.items() for part in ("--config-override", f"{key}={value}")]
    fixed = ["inference", "--checkpoint-path", str(CHECKPOINT), "--data-file", str(folder.parent / "cells.h5ad")]
    return CliRunner().invoke(app, [*fixed, *options])


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, anndata.AnnData]]:
    """Intermediate results of a run ended halfway, and the result of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("ended")
    random_adata(N_CELLS).write_h5ad(folder / "cells.h5ad")
    made: dict[str, tuple[Path, anndata.AnnData]] = {}

    def make(kind: str) -> tuple[Path, anndata.AnnData]:
        if kind not in made:
            with pytest.raises(EndedError):
                run(
                    [folder / "cells.h5ad"],
                    CHECKPOINT,
                    load_config(CHECKPOINT, options_for(folder / kind, kind)),
                    end_halfway,
                )
            whole = run(
                [folder / "cells.h5ad"], CHECKPOINT, load_config(CHECKPOINT, options_for(folder / "whole", kind))
            )
            assert whole is not None
            made[kind] = folder / kind, read_result(whole)
        return made[kind]

    return make


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("kind", ["cell", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("cge", "pooled"))])
def test_damaged_results_are_recomputed(
    kind: str, how: str, ended: Callable[[str], tuple[Path, anndata.AnnData]]
) -> None:
    kept, expected = ended(kind)
    folder = shutil.copytree(kept, kept.with_name(f"{kind} {how}"))
    parts = folder / "embeddings.h5ad.parts"
    pieces = sorted(parts.glob("p*-*.safetensors"))
    assert pieces
    if kind != "pooled":
        assert len(pieces) > 2
    damage(pieces[0], how)
    result = resume(folder, kind)
    assert result.exit_code == 0, result.output
    assert (f"{pieces[0]}: truncated" in result.stderr) == (how != "deleted")
    assert_same(read_result(folder / "embeddings.h5ad"), expected)
    assert [path.name for path in folder.iterdir()] == ["embeddings.h5ad"]


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_survey_is_recomputed(how: str, ended: Callable[[str], tuple[Path, anndata.AnnData]]) -> None:
    kept, expected = ended("cell")
    folder = shutil.copytree(kept, kept.with_name(f"survey {how}"))
    damage(folder / "embeddings.h5ad.parts" / "survey.safetensors", how)
    result = resume(folder, "cell")
    assert result.exit_code == 0, result.output
    assert "all cells are read again" in result.stderr
    assert_same(read_result(folder / "embeddings.h5ad"), expected)


@pytest.mark.parametrize("how", [how for how in DAMAGES if how != "deleted"])
def test_damaged_run_json_is_an_error(how: str, ended: Callable[[str], tuple[Path, anndata.AnnData]]) -> None:
    kept, _ = ended("cell")
    folder = shutil.copytree(kept, kept.with_name(f"run {how}"))
    damage(folder / "embeddings.h5ad.parts" / "run.json", how)
    result = resume(folder, "cell")
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 1
    assert "run.json: truncated" in errors[0]
    assert "delete" in errors[0]


@pytest.mark.parametrize("with_resume", [False, True])
def test_results_without_run_json_are_refused_and_kept(
    with_resume: bool, ended: Callable[[str], tuple[Path, anndata.AnnData]]
) -> None:
    kept, _ = ended("cell")
    folder = shutil.copytree(kept, kept.with_name(f"unknown {with_resume}"))
    parts = folder / "embeddings.h5ad.parts"
    (parts / "run.json").unlink()
    before = {path: path.read_bytes() for path in parts.iterdir()}
    config = load_config(CHECKPOINT, {**options_for(folder, "cell"), "model.inference_config.resume": with_resume})
    with pytest.raises(UsageError, match=r"contains results of an earlier run, but run\.json is missing; delete"):
        run([folder.parent / "cells.h5ad"], CHECKPOINT, config)
    assert {path: path.read_bytes() for path in parts.iterdir()} == before


def test_pieces_of_another_run_are_discarded(
    ended: Callable[[str], tuple[Path, anndata.AnnData]], tmp_path: Path
) -> None:
    kept, expected = ended("cell")
    folder = shutil.copytree(kept, kept.with_name("mixed"))
    random_adata(N_CELLS, seed=1).write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(EndedError):
        run(
            [tmp_path / "cells.h5ad"],
            CHECKPOINT,
            load_config(CHECKPOINT, options_for(tmp_path / "other", "cell")),
            end_halfway,
        )
    for foreign in (tmp_path / "other" / "embeddings.h5ad.parts").glob("piece-*"):
        shutil.copy(foreign, folder / "embeddings.h5ad.parts")
    result = resume(folder, "cell")
    assert result.exit_code == 0, result.output
    assert "belongs to another run; its results are recomputed" in result.stderr
    assert_same(read_result(folder / "embeddings.h5ad"), expected)


@pytest.mark.parametrize("with_resume", [False, True])
def test_concurrent_run_is_named_and_untouched(
    with_resume: bool, ended: Callable[[str], tuple[Path, anndata.AnnData]]
) -> None:
    kept, _ = ended("cell")
    folder = shutil.copytree(kept, kept.with_name(f"at work {with_resume}"))
    parts = folder / "embeddings.h5ad.parts"
    before = {path: path.read_bytes() for path in parts.iterdir()}
    with held_by_another(folder / ".embeddings.h5ad.lock") as other:
        config = load_config(CHECKPOINT, {**options_for(folder, "cell"), "model.inference_config.resume": with_resume})
        with pytest.raises(UsageError, match=rf"in use by another run \(process {other.pid} on "):
            run([folder.parent / "cells.h5ad"], CHECKPOINT, config)
    assert {path: path.read_bytes() for path in parts.iterdir()} == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Cells, an interrupted training run and an uninterrupted one."""
    folder = tmp_path_factory.mktemp("trained")
    cells = write_cells(folder / "cells.h5ad")

    def end(n_done: int, n_steps: int, loss: float) -> None:
        if n_done == 7:
            raise EndedError

    with pytest.raises(EndedError):
        fit(config_of(folder / "ended", cells, save_every=1), end)
    fit(config_of(folder / "whole", cells, save_every=1))
    return cells, folder / "ended", folder / "whole"


@pytest.mark.parametrize("how", ["flipped", *(pytest.param(how, marks=pytest.mark.slow) for how in DAMAGES[1:])])
@pytest.mark.parametrize("name", ["survey.safetensors", "statistics.safetensors", "baseline.json"])
def test_damaged_training_statistics_are_recomputed(
    name: str, how: str, trained: tuple[Path, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cells, ended_run, whole = trained
    folder = shutil.copytree(ended_run, tmp_path / "run")
    damage(folder / "state" / name, how)
    fit(config_of(folder, cells, save_every=1, resume=True))
    assert "all cells are read again" in caplog.text
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in ("run.json", "last.ckpt") for how in DAMAGES if (name, how) != ("last.ckpt", "deleted")],
)
def test_damaged_training_state_is_refused(
    name: str, how: str, trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    cells, ended_run, _ = trained
    folder = shutil.copytree(ended_run, tmp_path / "run")
    damage(folder / "state" / name, how)
    with pytest.raises(TranscriptFormerError, match=rf"{name}: (truncated|missing)"):
        fit(config_of(folder, cells, save_every=1, resume=True))


@pytest.mark.parametrize("how", ["flipped", "deleted"])
def test_training_does_not_resume_without_its_best_weights(
    how: str, trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """It fails at the start, not only when the weights are needed."""
    cells, ended_run, whole = trained
    for run_folder in (ended_run, whole):
        folder = shutil.copytree(run_folder, tmp_path / run_folder.name)
        damage(folder / "state" / "best.ckpt", how)
        with pytest.raises(CheckpointError, match=r"best\.ckpt: (truncated|missing).*; choose another --output-path"):
            fit(
                config_of(folder, cells, save_every=1, resume=True),
                lambda *progress: pytest.fail("training was resumed"),
            )


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_complete_run_stays_complete_without_its_metrics(
    how: str, trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    cells, _, whole = trained
    folder = shutil.copytree(whole, tmp_path / "run")
    damage(folder / "metrics.csv", how)
    done = fit(config_of(folder, cells, save_every=1, resume=True))
    assert done is not None
    assert done.checkpoint == folder / "checkpoint"


def test_training_without_a_state_restarts_with_a_warning(
    trained: tuple[Path, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cells, ended_run, whole = trained
    folder = shutil.copytree(ended_run, tmp_path / "run")
    (folder / "state" / "last.ckpt").unlink()
    fit(config_of(folder, cells, save_every=1, resume=True))
    assert "last.ckpt: missing; training starts over" in caplog.text
    assert_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
def test_every_flipped_bit_of_a_training_state_is_detected(
    name: str, trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    cells, _, whole = trained
    content = (whole / "state" / name).read_bytes()
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "checkpoint" / "config.json").unlink()  # as if the run had been killed before it was complete
    rng = np.random.default_rng(0)
    noticed = []
    for place in rng.integers(0, len(content), 12).tolist():
        (folder / "state" / name).write_bytes(
            content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        )
        try:
            fit(config_of(folder, cells, save_every=1, resume=True))
        except TranscriptFormerError as error:
            noticed.append(str(error))
            continue
        assert_same_run(folder, whole)  # an unused bit
        (folder / "checkpoint" / "config.json").unlink()
    assert len(noticed) > 5
    assert all(name in message for message in noticed)
