"""The comparisons of the trials detect differences."""

from pathlib import Path

import numpy as np
import pytest

from tests.faults.cases import Arrays
from tests.faults.trials import TOLERANCE, difference, left_behind, state_of


@pytest.fixture
def expected() -> Arrays:
    floats = np.array([1.0, 2.0, np.nan], np.float32)
    return {"floats": floats, "rows": np.arange(3), "names": np.array([b"a", b"b"], object)}


def test_equal_results_do_not_differ(expected: Arrays) -> None:
    assert difference({name: array.copy() for name, array in expected.items()}, expected) == 0.0


def test_floats_differ_by_their_relative_error(expected: Arrays) -> None:
    other = np.array([1.0, 2.00001, np.nan], np.float32)
    assert difference({**expected, "floats": other}, expected) == pytest.approx(1e-5 / 5**0.5, rel=0.1)
    assert difference({**expected, "floats": np.nextafter(expected["floats"], np.float32(9))}, expected) < TOLERANCE


@pytest.mark.parametrize(
    "other",
    [
        {"rows": np.array([0, 2, 1])},
        {"rows": np.arange(2)},
        {"rows": np.arange(3, dtype=np.int32)},
        {"names": np.array([b"a", b"c"], object)},
        {"floats": np.array([1.0, np.nan, 2.0], np.float32)},
        {"more": np.arange(3)},
    ],
    ids=["order", "length", "type", "text", "NaN", "more"],
)
def test_everything_else_must_be_equal(other: Arrays, expected: Arrays) -> None:
    with pytest.raises(AssertionError):
        difference({**expected, **other}, expected)


def test_temporary_names_are_found_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "x.parts").mkdir()
    for name in ("x.h5ad", ".x.lock", ".x.h5ad.tmp", "x.parts/.piece.safetensors.tmp"):
        (tmp_path / name).touch()
    assert sorted(left_behind(tmp_path)) == [".x.h5ad.tmp", "x.parts/.piece.safetensors.tmp"]


def test_states_ignore_random_names_and_times(tmp_path: Path) -> None:
    states: list[object] = []
    for run, step, content in (("0123abcd", "1,0,0.5,7", "a"), ("4567cdef", "1,0,0.6,7", "a"), ("4567cdef", "2", "a")):
        folder = tmp_path / str(len(states))
        folder.mkdir()
        (folder / f"piece-{run}").write_text(f"{run} {content}")
        (folder / "metrics.csv").write_text(f"step,epoch,seconds,genes\n{step}\n")
        states.append(state_of(folder))
    (folder / f"piece-{run}").write_text(f"{run} b")
    states.append(state_of(folder))
    assert len({*states}) == 3
    assert states[0] == states[1]
