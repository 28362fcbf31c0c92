"""Atomic writes of files and folders."""

from collections.abc import Callable
from pathlib import Path

import pytest

from transcriptformer.errors import OutputError, UsageError
from transcriptformer.fetching.fetcher import require_free_space
from transcriptformer.storage.atomic import (
    atomic_folder,
    atomic_write,
    check_free_space,
    check_writable,
    make_folder,
    refuse_overwriting,
)
from transcriptformer.training.folder import TrainingFolder


class StoppedError(Exception):
    """Any exception that ends a run."""


def fill(folder: Path, text: str) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "b").write_text(text)


def test_existing_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def stop_halfway() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise StoppedError

    with pytest.raises(StoppedError):
        stop_halfway()
    assert path.read_text() == "old"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_existing_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.mkdir()
    fill(path, "old")

    def stop_halfway() -> None:
        with atomic_folder(path) as temporary:
            fill(temporary, "half")
            raise StoppedError

    with pytest.raises(StoppedError):
        stop_halfway()
    assert (path / "a" / "b").read_text() == "old"
    with atomic_folder(path) as temporary:
        fill(temporary, "new")
        assert (path / "a" / "b").read_text() == "old"
    assert (path / "a" / "b").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("n_moves", "kept"), [(1, "old"), (2, "new")])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, PermissionError, MemoryError])
def test_exception_while_replacing_a_folder_loses_nothing(
    error: type[BaseException], n_moves: int, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.mkdir()
    fill(path, "old")
    rename, moved = Path.rename, list[Path]()

    def move(self: Path, target: Path) -> None:
        rename(self, target)
        moved.append(self)
        if len(moved) == n_moves:
            raise error

    def replace() -> None:
        with atomic_folder(path) as temporary:
            fill(temporary, "new")

    monkeypatch.setattr(Path, "rename", move)
    with pytest.raises(OutputError if error is PermissionError else error):
        replace()
    assert (path / "a" / "b").read_text() == kept
    assert list(tmp_path.iterdir()) == [path]


def test_backup_that_cannot_be_restored_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, older = tmp_path / "x", tmp_path / ".x.old"
    path.mkdir()
    fill(path, "old")
    rename = Path.rename

    def move(self: Path, target: Path) -> None:
        if target == path:
            raise PermissionError
        rename(self, target)

    def replace() -> None:
        with atomic_folder(path) as temporary:
            fill(temporary, "new")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", move)
        with pytest.raises(OutputError):
            replace()
    assert (older / "a" / "b").read_text() == "old"
    assert list(tmp_path.iterdir()) == [older]
    replace()
    assert (path / "a" / "b").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_backup_is_restored_after_a_kill(tmp_path: Path) -> None:
    path, older, half = tmp_path / "x", tmp_path / ".x.old", tmp_path / ".x.tmp"
    older.mkdir()
    fill(older, "old")
    half.mkdir()

    def stop_at_once() -> None:
        with atomic_folder(path):
            raise StoppedError

    with pytest.raises(StoppedError):
        stop_at_once()
    assert (path / "a" / "b").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_errors_name_the_path_and_reason(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"gone/x: cannot be written \(No such file or directory\)"),
        atomic_write(tmp_path / "gone" / "x") as temporary,
    ):
        temporary.write_text("new")
    with (
        pytest.raises(OutputError, match=r"gone/x: cannot be written \(No such file or directory\)"),
        atomic_folder(tmp_path / "gone" / "x"),
    ):
        raise AssertionError


MAKERS: dict[str, Callable[[Path], object]] = {
    "make_folder": make_folder,
    "inference": lambda folder: check_writable(folder / "x.h5ad"),
    "training": lambda folder: TrainingFolder(folder.parent).lock(),
    "download": lambda folder: require_free_space(folder, 0),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_new_folders_are_synced_in_their_parents(
    make: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("transcriptformer.storage.atomic.sync_folder", synced.append)
    make(tmp_path / "a" / "b" / "state")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(synced)
    synced.clear()
    make_folder(tmp_path / "a" / "b" / "state")
    assert not synced


def test_lack_of_disk_space_is_reported_before_writing(tmp_path: Path) -> None:
    check_free_space(tmp_path / "x", 1000)
    with pytest.raises(OutputError, match=r"x: cannot be written: needs \d+\.00 GiB, [\d.]+ GiB free; wait"):
        check_free_space(tmp_path / "x", 2**60, "; wait")


def test_an_output_that_is_also_an_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells, link = Path("cells.h5ad"), Path("link.h5ad")
    cells.touch()
    link.symlink_to(cells)
    for output, read in (
        (cells, cells),
        (cells, "./cells.h5ad"),
        (cells, tmp_path / cells),
        (cells, link),
        (link, cells),
    ):
        with pytest.raises(UsageError, match=f"^--plot {output}: is also an input"):
            refuse_overwriting(output, ["other.h5ad", read], "--plot")
    refuse_overwriting(cells, ["other.h5ad", "s3://cells.h5ad", "https://host/cells.h5ad"])
    refuse_overwriting(Path("s3:/cells.h5ad"), ["s3://cells.h5ad"])
