"""Files and folders are whole or not there."""

from collections.abc import Callable
from pathlib import Path

import pytest

from transcriptformer.errors import OutputError
from transcriptformer.fetching.fetcher import need_space
from transcriptformer.storage.atomic import atomic_folder, atomic_write, check_room, check_writable, make_folder
from transcriptformer.training.folder import TrainingFolder


class StoppedError(Exception):
    """Stands for whatever ends a run."""


def fill(folder: Path, text: str) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "b").write_text(text)


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
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


def test_an_older_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
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
def test_an_exception_amid_the_moves_of_a_folder_loses_nothing(
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


def test_an_older_folder_that_cannot_be_put_back_stays_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_kill_between_the_moves_of_a_folder_is_made_good(tmp_path: Path) -> None:
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


def test_what_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
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
    "download": lambda folder: need_space(folder, 0),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_new_folder_is_on_disk_in_those_above_it(
    make: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("transcriptformer.storage.atomic.sync_folder", synced.append)
    make(tmp_path / "a" / "b" / "state")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(synced)
    synced.clear()
    make_folder(tmp_path / "a" / "b" / "state")
    assert not synced


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    check_room(tmp_path / "x", 1000)
    with pytest.raises(OutputError, match=r"x: cannot be written: \d+\.00 GiB are needed, [\d.]+ GiB are free; wait"):
        check_room(tmp_path / "x", 2**60, "; wait")
