"""What is listed in a part is complete, whatever happened to the process that wrote it."""

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_cases import CHECKPOINT
from transcriptformer.config import load_config
from transcriptformer.errors import OutputError
from transcriptformer.parts import Field, Parts, PartWriter, layout_of

PER_CELL = {"embeddings": Field("float32", 3), "llh": Field("float32")}
PER_GENE = {
    "n_genes": Field("int32"),
    "genes": Field("int32", per_gene=True),
    "cge_embeddings": Field("float32", 2, per_gene=True),
    "llh": Field("float32"),
}


def results(rows: list[int]) -> dict[str, np.ndarray]:
    """Of each row other numbers, and as many genes as the last digit of its number."""
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


def write_part(folder: Path, *batches: list[int], layout: dict[str, Field] = PER_GENE, process: int = 0) -> PartWriter:
    writer = PartWriter(folder, process, layout)
    for rows in batches:
        writer.add(results(rows))
        writer.flush()
    return writer


def assert_reads(parts: Parts, start: int, stop: int) -> None:
    expected = results(parts.rows[start:stop].tolist())
    for name, field in parts.layout.items():
        read = parts.read_genes if field.per_gene else parts.read
        np.testing.assert_array_equal(read(name, start, stop), expected[name])
        assert read(name, start, stop).dtype == field.dtype


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@st.composite
def rows_in_parts(draw: st.DrawFn) -> list[tuple[int, list[list[int]]]]:
    """Rows 0, 1, … in any order, cut into batches, and these into parts: a process and its batches each."""
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
def test_cells_come_in_their_order_from_any_parts(
    parts: list[tuple[int, list[list[int]]]], layout: dict[str, Field], gap: int, slices: list[tuple[int, int]]
) -> None:
    n_rows = sum(len(rows) for _, batches in parts for rows in batches)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("transcriptformer.parts._GAP", gap)
        for process, batches in parts:
            write_part(Path(folder), *batches, layout=layout, process=process)
        table = Parts(Path(folder), layout)
        assert table.rows.tolist() == list(range(n_rows))
        assert table.is_done(n_rows + 2).tolist() == [True] * n_rows + [False] * 2
        size = sum(path.stat().st_size for path in Path(folder).iterdir() if path.suffix != ".rows")
        assert table.n_bytes == size
        for ends in [(0, n_rows), *slices]:
            start, stop = sorted(min(end, n_rows) for end in ends)
            assert_reads(table, start, stop)


@settings(max_examples=60)
@given(data=st.data(), layout=st.sampled_from([PER_CELL, PER_GENE]))
def test_a_write_that_was_cut_off_is_ignored_and_made_good_by_the_next_attempt(
    data: st.DataObject, layout: dict[str, Field]
) -> None:
    rows: list[int] = data.draw(st.permutations(range(20)))
    first, second = data.draw(st.integers(0, 10)), data.draw(st.integers(11, 20))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = write_part(folder, *([rows[:first]] if first else []), layout=layout)
        before = {field: len(contents(folder).get(f"{writer.stem.name}.{field}", b"")) for field in writer.layout}
        writer.add(results(rows[first:second]))
        writer.flush()
        # Fields are written one after the other: those before the cut are whole, those after it as they were.
        cut = data.draw(st.sampled_from(list(writer.layout)))
        n_listed = first
        for i, field in enumerate(writer.layout):
            path = writer.stem.with_name(f"{writer.stem.name}.{field}")
            if field == cut:
                size = data.draw(st.integers(before[field], path.stat().st_size - (field == "rows")))
                n_listed = size // 8 if field == "rows" else first
                os_truncate(path, size)
            elif i > list(writer.layout).index(cut):
                os_truncate(path, before[field])

        kept = Parts(folder, layout)
        assert kept.rows.tolist() == sorted(rows[:n_listed])
        assert_reads(kept, 0, n_listed)
        write_part(folder, rows[n_listed:], layout=layout)
        whole = Parts(folder, layout)
        assert whole.rows.tolist() == list(range(20))
        assert_reads(whole, 0, 20)


def os_truncate(path: Path, size: int) -> None:
    """Cut a file off; one that had not been begun is not there."""
    if size:
        with path.open("r+b") as file:
            file.truncate(size)
    elif path.suffix == ".rows":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("layout", [PER_CELL, PER_GENE], ids=["per cell", "per gene"])
def test_what_lies_beyond_the_listed_rows_is_ignored(layout: dict[str, Field], tmp_path: Path) -> None:
    writer = write_part(tmp_path, [7, 3], [15], layout=layout)
    for field, extra in zip(
        writer.layout, (b"\xff" * 5, b"\x01" * 64, b"\xff" * 7, b"\x02" * 9, b"\3" * 7), strict=False
    ):
        path = writer.stem.with_name(f"{writer.stem.name}.{field}")
        path.write_bytes(path.read_bytes() + extra[: 7 if field == "rows" else None])
    parts = Parts(tmp_path, layout)
    assert parts.rows.tolist() == [3, 7, 15]
    assert_reads(parts, 0, 3)


def test_a_new_attempt_leaves_older_parts_as_they_are(tmp_path: Path) -> None:
    write_part(tmp_path, [1, 2])
    write_part(tmp_path, process=1)  # killed before it wrote anything
    before = contents(tmp_path)
    write_part(tmp_path, [3])
    write_part(tmp_path, [4], process=1)
    write_part(tmp_path, [5])
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len({name.partition(".")[0] for name in after}) == 5
    assert Parts(tmp_path, PER_GENE).rows.tolist() == [1, 2, 3, 4, 5]


def test_a_row_that_two_attempts_have_comes_once(tmp_path: Path) -> None:
    write_part(tmp_path, [1, 2, 3])
    write_part(tmp_path, [3, 2, 14])
    parts = Parts(tmp_path, PER_GENE)
    assert parts.rows.tolist() == [1, 2, 3, 14]
    assert_reads(parts, 0, 4)


def test_a_folder_without_parts_has_no_rows(tmp_path: Path) -> None:
    parts = Parts(tmp_path, PER_GENE)
    assert (len(parts.rows), parts.n_bytes) == (0, 0)
    assert not parts.is_done(3).any()


@pytest.mark.parametrize(("limit", "value"), [("SECONDS_AT_RISK", 0), ("BYTES_AT_RISK", 50)])
def test_results_wait_in_memory_neither_long_nor_in_great_number(
    limit: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = PartWriter(tmp_path, 0, PER_CELL)
    writer.add(results([1, 2, 3]))
    assert len(Parts(tmp_path, PER_CELL).rows) == 0
    monkeypatch.setattr(f"transcriptformer.parts.{limit}", value)
    writer.add(results([4, 5]))
    assert Parts(tmp_path, PER_CELL).rows.tolist() == [1, 2, 3, 4, 5]


def test_a_folder_that_went_away_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="results cannot be written"):
        PartWriter(tmp_path / "gone", 0, PER_CELL)


@pytest.mark.parametrize(
    ("emb_type", "output_keys", "fields"),
    [
        ("cell", ["embeddings"], {"embeddings"}),
        ("cell", ["embeddings", "llh"], {"embeddings", "llh"}),
        ("cge", ["embeddings"], {"n_genes", "genes", "cge_embeddings"}),
        ("cge", ["llh"], {"llh"}),
    ],
)
def test_only_what_is_wanted_is_kept(emb_type: str, output_keys: list[str], fields: set[str]) -> None:
    wanted = {"model.inference_config.emb_type": emb_type, "model.inference_config.output_keys": output_keys}
    inference = load_config(CHECKPOINT, wanted).model.inference_config
    assert layout_of(inference, 32).keys() == fields
