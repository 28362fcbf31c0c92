"""Pieces are written atomically and read as one table, whatever happened to their writers."""

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_cases import CHECKPOINT
from transcriptformer.checkpoint.published import load_config
from transcriptformer.errors import OutputError
from transcriptformer.inference.embeddings import layout_of
from transcriptformer.storage.results import N_GENES, Field, Layout, Pieces, PieceWriter, verified_pieces
from transcriptformer.storage.sealed import SealedFile

PER_CELL = {"embeddings": Field("float32", 3), "llh": Field("float32")}
PER_GENE = {
    "n_genes": Field("int32"),
    "genes": Field("int32", per_gene=True),
    "cge_embeddings": Field("float32", 2, per_gene=True),
    "llh": Field("float32"),
}


def results(rows: list[int]) -> dict[str, np.ndarray]:
    """Distinct numbers for each row, with as many genes as the last digit of the row number."""
    of_cell, n_genes = np.array(rows, np.int64), np.array(rows, np.int32) % 10
    of_gene = np.repeat(of_cell, n_genes)
    gene = of_gene * 100 + np.arange(len(of_gene)) - np.repeat(np.cumsum(n_genes) - n_genes, n_genes)
    return {
        "rows": of_cell,
        "embeddings": of_cell[:, None] + np.array([0.25, 0.5, 0.75], np.float32),
        "llh": -of_cell.astype(np.float32),
        "n_genes": n_genes,
        "genes": gene.astype(np.int32),
        "cge_embeddings": np.stack([gene, -gene], axis=1).astype(np.float32),
    }


RUN = "a run"


def write_pieces(
    folder: Path, *batches: list[int], layout: dict[str, Field] = PER_GENE, process: int = 0, run: str = RUN
) -> PieceWriter:
    writer = PieceWriter(folder, process, layout, run)
    for rows in batches:
        writer.add(results(rows))
        writer.flush()
    return writer


def read(folder: Path, layout: Layout) -> Pieces:
    return Pieces(verified_pieces(folder, RUN), layout)


def assert_reads(pieces: Pieces, start: int, stop: int) -> None:
    expected = results(pieces.rows[start:stop].tolist())
    for name, field in pieces.layout.items():
        read = pieces.read_genes if field.per_gene else pieces.read
        np.testing.assert_array_equal(read(name, start, stop), expected[name])
        assert read(name, start, stop).dtype == field.dtype


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@st.composite
def rows_in_parts(draw: st.DrawFn) -> list[tuple[int, list[list[int]]]]:
    """Rows 0, 1, … in any order, split into batches, and these into parts: a process and its batches."""
    rows = draw(st.permutations(range(draw(st.integers(1, 60)))))
    cuts = sorted(draw(st.sets(st.integers(1, len(rows)), max_size=12)) | {0, len(rows)})
    batches = [rows[start:stop] for start, stop in pairwise(cuts)]
    ends = sorted(draw(st.sets(st.integers(1, len(batches)), max_size=4)) | {0, len(batches)})
    return [(draw(st.integers(0, 2)), batches[start:stop]) for start, stop in pairwise(ends)]


@settings(max_examples=60)
@given(
    parts=rows_in_parts(),
    layout=st.sampled_from([PER_CELL, PER_GENE]),
    gap=st.sampled_from([0, 3, 4096]),
    slices=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=5),
)
def test_cells_are_read_in_order_from_any_pieces(
    parts: list[tuple[int, list[list[int]]]], layout: dict[str, Field], gap: int, slices: list[tuple[int, int]]
) -> None:
    n_rows = sum(len(rows) for _, batches in parts for rows in batches)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("transcriptformer.storage.results._GAP", gap)
        for process, batches in parts:
            write_pieces(Path(folder), *batches, layout=layout, process=process)
        table = read(Path(folder), layout)
        assert table.rows.tolist() == list(range(n_rows))
        assert table.is_done(n_rows + 2).tolist() == [True] * n_rows + [False] * 2
        stored = [SealedFile(path).read(name) for path in Path(folder).iterdir() for name in layout]
        assert table.n_bytes == sum(array.nbytes for array in stored)
        for ends in [(0, n_rows), *slices]:
            start, stop = sorted(min(end, n_rows) for end in ends)
            assert_reads(table, start, stop)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other run", "not ours"])
def test_damaged_or_foreign_piece_is_discarded_with_a_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pieces(tmp_path, [3, 14])
    write_pieces(tmp_path, [7, 8], run="another" if damage == "other run" else RUN)
    path = next(p for p in tmp_path.iterdir() if 8 in SealedFile(p).read("rows"))
    content = path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    damaged = {"flip": flipped, "cut": content[:-9], "empty": b"", "not ours": b"\xff" * 100}
    path.write_bytes(damaged.get(damage, content))
    pieces = read(tmp_path, PER_GENE)
    assert f"{path}: " in caplog.text
    assert "recomputed" in caplog.text
    assert pieces.rows.tolist() == [3, 14]
    assert_reads(pieces, 0, 2)


def test_damaged_piece_that_cannot_be_deleted_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = write_pieces(tmp_path, [3, 14], [7])
    path = tmp_path / f"{writer.stem}-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "unlink", refuse)
    assert read(tmp_path, PER_GENE).rows.tolist() == [7]


def test_unreadable_piece_is_not_deleted(tmp_path: Path) -> None:
    write_pieces(tmp_path, [3, 14])
    path = next(tmp_path.iterdir())
    path.rename(tmp_path / "piece")
    path.symlink_to(path.name)  # a loop: cannot be read
    with pytest.raises(OutputError, match=r"cannot be read \(Too many levels of symbolic links\)"):
        read(tmp_path, PER_GENE)
    assert path.is_symlink()


@pytest.mark.parametrize("broken", ["embeddings", "genes", N_GENES])
def test_invalid_batch_stops_the_writer(broken: str, tmp_path: Path) -> None:
    """None of its fields may be mixed with those of the next batch."""
    layout = {**PER_GENE, "embeddings": Field("float32", 3)}
    writer = write_pieces(tmp_path, [1, 2], layout=layout)
    wrong = np.array(["many", "few"]) if broken == N_GENES else results([3])[broken]
    with pytest.raises((ValueError, AssertionError)):
        writer.add({**results([3, 4]), broken: wrong})
    with pytest.raises((ValueError, AssertionError)):
        writer.add(results([5, 6]))
    with pytest.raises((ValueError, AssertionError)):
        writer.flush()
    assert read(tmp_path, layout).rows.tolist() == [1, 2]


def test_failed_writer_rejects_more_results(tmp_path: Path) -> None:
    folder = tmp_path / "pieces"
    folder.mkdir()
    writer = write_pieces(folder, [1, 2])
    writer.add(results([3]))
    folder.rename(tmp_path / "away")
    with pytest.raises(OutputError, match=r"results cannot be written \(No such file or directory\)"):
        writer.flush()
    (tmp_path / "away").rename(folder)
    with pytest.raises(OutputError, match="results cannot be written"):
        writer.add(results([4]))
    with pytest.raises(OutputError, match="results cannot be written"):
        writer.flush()
    assert read(folder, PER_GENE).rows.tolist() == [1, 2]


def test_writer_without_memory_rejects_more_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = write_pieces(tmp_path, [1, 2])
    writer.add(results([3]))

    def lack(*arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("transcriptformer.storage.results.write_sealed", lack)
        with pytest.raises(MemoryError):
            writer.flush()
    with pytest.raises(MemoryError):
        writer.add(results([4]))
    with pytest.raises(MemoryError):
        writer.flush()
    assert read(tmp_path, PER_GENE).rows.tolist() == [1, 2]


def test_new_attempt_keeps_older_pieces(tmp_path: Path) -> None:
    write_pieces(tmp_path, [1, 2])
    write_pieces(tmp_path, process=1)  # killed before it wrote anything
    before = contents(tmp_path)
    write_pieces(tmp_path, [3])
    write_pieces(tmp_path, [4], process=1)
    write_pieces(tmp_path, [5])
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) == 4
    assert read(tmp_path, PER_GENE).rows.tolist() == [1, 2, 3, 4, 5]


def test_row_in_two_pieces_is_read_once(tmp_path: Path) -> None:
    write_pieces(tmp_path, [1, 2, 3])
    write_pieces(tmp_path, [3, 2, 14])
    pieces = read(tmp_path, PER_GENE)
    assert pieces.rows.tolist() == [1, 2, 3, 14]
    assert_reads(pieces, 0, 4)


def test_folder_without_pieces_has_no_rows(tmp_path: Path) -> None:
    pieces = read(tmp_path, PER_GENE)
    assert (len(pieces.rows), pieces.n_bytes) == (0, 0)
    assert not pieces.is_done(3).any()


@pytest.mark.parametrize(("limit", "value"), [("FLUSH_SECONDS", 0), ("FLUSH_BYTES", 50)])
def test_results_are_flushed_by_time_and_by_size(
    limit: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = PieceWriter(tmp_path, 0, PER_CELL, RUN)
    writer.add(results([1, 2, 3]))
    assert len(read(tmp_path, PER_CELL).rows) == 0
    monkeypatch.setattr(f"transcriptformer.storage.results.{limit}", value)
    writer.add(results([4, 5]))
    assert read(tmp_path, PER_CELL).rows.tolist() == [1, 2, 3, 4, 5]


def test_deleted_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="results cannot be written"):
        write_pieces(tmp_path / "gone", [1])


@pytest.mark.parametrize(
    ("emb_type", "output_keys", "fields"),
    [
        ("cell", ["embeddings"], {"embeddings"}),
        ("cell", ["embeddings", "llh"], {"embeddings", "llh"}),
        ("cge", ["embeddings"], {"n_genes", "genes", "cge_embeddings"}),
        ("cge", ["llh"], {"llh"}),
    ],
)
def test_only_requested_fields_are_stored(emb_type: str, output_keys: list[str], fields: set[str]) -> None:
    wanted = {"model.inference_config.emb_type": emb_type, "model.inference_config.output_keys": output_keys}
    inference = load_config(CHECKPOINT, wanted).model.inference_config
    assert layout_of(inference, 32).keys() == fields
