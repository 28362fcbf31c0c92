"""Sealed files round-trip, or are reported as damaged."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from transcriptformer.errors import DamagedError, OutputError
from transcriptformer.storage.sealed import SealedFile, read_json, read_sealed, write_json, write_sealed

ARRAYS: dict[str, np.ndarray] = {
    "rows": np.array([3, 1, 2], np.int64),
    "embeddings": np.arange(12, dtype=np.float32).reshape(3, 4),
    "done": np.array([True, False, True]),
    "n": np.array(7, np.int64),
    "none": np.zeros((0, 5)),
}


def test_arrays_round_trip(tmp_path: Path) -> None:
    write_sealed(tmp_path / "x", ARRAYS, {"run": "a"})
    for name, array in read_sealed(tmp_path / "x").items():
        np.testing.assert_array_equal(array, ARRAYS[name])
        assert array.dtype == ARRAYS[name].dtype
    assert SealedFile(tmp_path / "x").metadata == {"run": "a"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_sealed_file_is_a_safetensors_file(tmp_path: Path) -> None:
    write_sealed(tmp_path / "x", ARRAYS, {"run": "a"})
    for name, array in load_file(tmp_path / "x").items():
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_array_sequences_are_concatenated(tmp_path: Path) -> None:
    whole = np.arange(60, dtype=np.float32).reshape(12, 5)
    write_sealed(tmp_path / "x", {"a": [whole[:5], np.asfortranarray(whole[5:9]), whole[9:].astype(">f4")]})
    np.testing.assert_array_equal(read_sealed(tmp_path / "x")["a"], whole)
    np.testing.assert_array_equal(SealedFile(tmp_path / "x").read_rows("a", 4, 10), whole[4:10])


def test_every_flipped_bit_and_truncation_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_sealed(path, {"a": np.arange(5, dtype=np.int32), "b": np.ones(3)}, {"run": "0123"})
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(DamagedError, match=f"{path}: truncated, damaged"):
                read_sealed(path)
        path.write_bytes(whole[:place])
        with pytest.raises(DamagedError, match=f"{path}: truncated, damaged"):
            read_sealed(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedError, match=f"{path}: truncated, damaged"):
        read_sealed(path)


def test_rows_outside_an_array_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "some"
    write_sealed(path, {"a": np.zeros(3), "b": np.full(3, 99.0)})
    file = SealedFile(path)
    for start, stop in ((0, 4), (-1, 2), (2, 1)):
        with pytest.raises(IndexError, match="a has 3 rows"):
            file.read_rows("a", start, stop)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"x: missing"):
        read_sealed(tmp_path / "x")
    with pytest.raises(DamagedError, match=r"x: missing"):
        read_json(tmp_path / "x")


def test_existing_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_sealed(path, {"a": np.zeros(3)})
    path.with_name(".x.tmp").mkdir()  # blocks the temporary file
    with pytest.raises(OutputError, match=r"x: cannot be written \(Is a directory\)"):
        write_sealed(path, {"a": np.ones(3)})
    np.testing.assert_array_equal(read_sealed(path)["a"], np.zeros(3))


def test_json_round_trips_and_every_change_is_detected(tmp_path: Path) -> None:
    path, values = tmp_path / "x.json", {"a": [1, 2.5, None], "b": {"ü": "ß", "nan": float("inf")}}
    write_json(path, values)
    assert read_json(path) == values
    text = path.read_text(encoding="utf-8")
    for change in (text.replace("2.5", "2.6"), text[:-2], "", "[]", "[" * 100_000):
        path.write_text(change, encoding="utf-8")
        with pytest.raises(DamagedError, match=r"x\.json: truncated, damaged"):
            read_json(path)
