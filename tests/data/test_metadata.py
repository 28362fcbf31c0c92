"""Metadata read in blocks equals what anndata reads, and that of several inputs is joined."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import random_adata
from transcriptformer.checkpoint.published import load_config
from transcriptformer.data.joined import JoinedMetadata
from transcriptformer.data.metadata import Metadata, MetadataInMemory, StoredMetadata, open_metadata
from transcriptformer.data.store import Store
from transcriptformer.errors import DataError
from transcriptformer.inference.run import run

pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding will be the default"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part in the Zarr format 3"),
]

N_ROWS = 23
STORED = ["cells.h5ad", "v2.zarr", "v3.zarr"]


def with_missing(values: Iterable[Any], missing: Iterable[bool]) -> Any:
    return [None if gap else value for value, gap in zip(values, missing, strict=True)]


def frame_of_every_type() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    letters = rng.choice(["c", "a", "b"], N_ROWS)
    missing = rng.random(N_ROWS) < 0.3
    return pd.DataFrame(
        {
            "unordered": pd.Categorical(with_missing(letters, missing), categories=["unused", "c", "a", "b"]),
            "ordered": pd.Categorical(letters, categories=["c", "b", "a"], ordered=True),
            "categories are numbers": pd.Categorical(rng.integers(0, 3, N_ROWS)),
            "text": [f"käfer {i % 7}" for i in range(N_ROWS)],
            "float32": np.where(missing, np.nan, rng.random(N_ROWS)).astype(np.float32),
            "float64": rng.random(N_ROWS),
            "int8": rng.integers(-5, 5, N_ROWS).astype(np.int8),
            "uint32": rng.integers(0, 2**31, N_ROWS).astype(np.uint32),
            "int64": rng.integers(-(2**40), 2**40, N_ROWS),
            "bool": rng.random(N_ROWS) < 0.5,
            "nullable int": pd.array(with_missing(range(N_ROWS), missing), dtype="Int16"),
            "nullable bool": pd.array(with_missing(letters == "a", missing), dtype="boolean"),
            "nullable text": pd.array(with_missing(letters, missing), dtype="string"),
        },
        index=pd.Index([f"cell {i}" for i in range(N_ROWS)], name="barcode"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metadata")
    adata = anndata.AnnData(obs=frame_of_every_type())
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(folder / "cells.h5ad", convert_strings_to_categoricals=False)
        for zarr_format in (2, 3):
            with anndata.settings.override(zarr_write_format=zarr_format):
                adata.write_zarr(folder / f"v{zarr_format}.zarr", convert_strings_to_categoricals=False)
    return folder


def as_anndata_reads(path: Path) -> pd.DataFrame:
    return (anndata.read_zarr(path) if path.suffix == ".zarr" else anndata.read_h5ad(path)).obs


@pytest.mark.parametrize("name", STORED)
def test_rows_equal_those_that_anndata_reads(name: str, folder: Path) -> None:
    metadata, expected = open_metadata(Store(folder / name), "obs"), as_anndata_reads(folder / name)
    assert isinstance(metadata, StoredMetadata)
    assert len(metadata) == N_ROWS
    assert metadata.columns == list(expected.columns)

    @settings(max_examples=15)
    @given(
        ends=st.tuples(st.integers(0, N_ROWS), st.integers(0, N_ROWS)),
        columns=st.lists(st.sampled_from(metadata.columns), unique=True),
    )
    def check(ends: tuple[int, int], columns: list[str]) -> None:
        start, stop = sorted(ends)
        pd.testing.assert_frame_equal(metadata.rows(start, stop), expected.iloc[start:stop])
        pd.testing.assert_frame_equal(metadata.rows(start, stop, columns), expected.iloc[start:stop][columns])

    check()


def in_memory(**columns: object) -> Metadata:
    return MetadataInMemory(pd.DataFrame(columns, index=["c0", "c1", "c2"]))


def joined(*parts: Metadata, columns: list[str] | None = None) -> pd.DataFrame:
    """Join tables, reading two rows at a time."""
    table = JoinedMetadata(parts, columns)
    blocks = [
        table.rows(i, start, min(start + 2, len(part)))
        for i, part in enumerate(parts)
        for start in range(0, len(part), 2)
    ]
    for block in blocks:  # written to the same arrays of a file
        pd.testing.assert_series_equal(block.dtypes, blocks[0].dtypes)
        assert block.index.name == blocks[0].index.name
    return pd.concat(blocks)


def test_categories_are_merged() -> None:
    parts = [in_memory(x=pd.Categorical(values)) for values in (["b", "a", None], ["c", "b", "b"])]
    column = joined(*parts)["x"]
    assert set(column.cat.categories) == {"a", "b", "c"}
    assert column.astype(object).where(column.notna(), None).tolist() == ["b", "a", None, "c", "b", "b"]


def test_equal_ordered_categories_stay_ordered() -> None:
    stages = pd.CategoricalDtype(["early", "late"], ordered=True)
    parts = [in_memory(x=pd.Categorical(values, dtype=stages)) for values in (["late"] * 3, ["early", None, "late"])]
    assert joined(*parts)["x"].dtype == stages


@pytest.mark.parametrize(
    ("first", "second", "dtype"),
    [
        (np.array([1, 2, 3], np.int16), None, np.float64),
        (np.array([1, 2, 3], np.int16), np.array([4, 5, 6], np.int64), np.int64),
        (np.array([1, 2, 3]), np.array([0.5, np.nan, 1]), np.float64),
        (np.array([0.5, 1, 2], np.float32), None, np.float32),
        (np.array([True, False, True]), None, "boolean"),
        (np.array([True, False, True]), pd.array([True, None, False], dtype="boolean"), "boolean"),
        (pd.array([1, None, 3], dtype="Int32"), None, "Int32"),
        (pd.array([1, None, 3], dtype="Int32"), np.array([4, 5, 6], np.int32), "Int32"),
        (pd.array(["a", None, "b"], dtype="string"), pd.array(["c", "d", None], dtype="string"), "string"),
        (np.array(["a", "b", "a"], object), np.array(["c", "d", "e"], object), object),
    ],
    ids=[
        *("int, missing", "int, wider int", "int, float", "float, missing", "bool, missing", "bool, nullable bool"),
        *("nullable int, missing", "nullable int, int", "nullable text, both", "text, both"),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_numbers_are_widened_and_missing_values_kept(
    first: object, second: object, dtype: object, reverse: bool
) -> None:
    values = [first, second][:: -1 if reverse else 1]
    column = joined(*(in_memory(other=[0, 0, 0], **({} if v is None else {"x": v})) for v in values))["x"]
    assert column.dtype == dtype
    expected = [x for v in values for x in ([None] * 3 if v is None else np.asarray(v, object).tolist())]
    assert column.isna().tolist() == pd.isna(np.array(expected, object)).tolist()
    assert column.dropna().tolist() == [x for x in expected if not pd.isna(x)]


@pytest.mark.parametrize(
    "other", [None, pd.Categorical(["x", None, "y"])], ids=["a table without it", "a categorical column"]
)
def test_text_with_missing_values_becomes_categorical(other: pd.Categorical | None) -> None:
    column = joined(in_memory(x=["c", "a", "c"]), in_memory(**({} if other is None else {"x": other})))["x"]
    assert isinstance(column.dtype, pd.CategoricalDtype)
    gaps = [None] * 3 if other is None else ["x", None, "y"]
    assert column.astype(object).where(column.notna(), None).tolist() == ["c", "a", "c", *gaps]
    assert list(column.cat.categories) == sorted({"c", "a"} | {x for x in gaps if x is not None})


COLUMNS: dict[str, Any] = {
    "text": ["a", "b", "1"],
    "text categories": pd.Categorical(["b", "a", None]),
    "nullable text": pd.array(["a", "b", None], dtype="string"),
    "int": np.array([1, 2, 3], np.int16),
    "int categories": pd.Categorical([7, 8, None]),
    "nullable int": pd.array([4, 5, None], dtype="Int32"),
    "float": np.array([0.1, 2, np.nan], np.float32),
    "float categories": pd.Categorical([0.5, 2.0, None]),
    "bool": np.array([True, False, True]),
    "bool categories": pd.Categorical([True, False, None]),
    "nullable bool": pd.array([False, True, None], dtype="boolean"),
    "no values": pd.Categorical([None, None, None]),
    "dates": pd.Series(["2024-01-01", "2024-01-02", None]).astype("datetime64[ns]").array,
    "complex": np.array([1, 2j, 3]),
    "lists": [[1], [2], None],
}


def kind_of(name: str) -> str:
    plain = name.removeprefix("nullable ").removesuffix(" categories")
    return "numbers" if plain in ("int", "float") else plain


def none_for_missing(values: Any) -> list[Any]:
    return [None if np.ndim(value) == 0 and pd.isna(value) else value for value in pd.Series(values)]


@pytest.mark.parametrize("first", COLUMNS)
@pytest.mark.parametrize("second", COLUMNS)
def test_joining_any_two_kinds_of_values(first: str, second: str, caplog: pytest.LogCaptureFixture) -> None:
    """Values are kept, or converted to text with a warning."""
    column = joined(in_memory(x=COLUMNS[first]), in_memory(x=COLUMNS[second]))["x"]
    expected = [*none_for_missing(COLUMNS[first]), *none_for_missing(COLUMNS[second])]
    found = none_for_missing(column)
    if "writing it as text" in caplog.text:
        assert kind_of(first) != kind_of(second) or first == "lists"
        expected = [None if value is None else str(value) for value in expected]
        if "float" in (first, second):
            expected = ["0.1" if value and value.startswith("0.1") else value for value in expected]
        assert {type(value) for value in found} <= {str, type(None)}
    else:
        assert kind_of(first) == kind_of(second) or "no values" in (first, second)
    assert found == expected


def test_column_without_values_has_no_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Empty text is often stored as NaN, which is a number."""
    texts = ["a", None, "b"]
    column = joined(in_memory(x=[np.nan] * 3), in_memory(x=pd.Categorical(texts)))["x"]
    assert none_for_missing(column) == [None, None, None, *texts]
    assert caplog.text == ""


def test_missing_values_beyond_the_first_rows_are_kept() -> None:
    column = joined(in_memory(x=pd.Categorical([1, 2, None])), in_memory(x=[3, 4, 5]))["x"]
    assert column.dtype == "Int64"
    assert column[:2].tolist() == [1, 2]
    assert column.isna().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("second", "dtype"), [({}, "Int64"), ({"x": [4, 5, 6]}, np.int64), ({"x": [0.5, 1, 2]}, "category")]
)
def test_integers_are_not_rounded(second: dict[str, object], dtype: object, caplog: pytest.LogCaptureFixture) -> None:
    big = 2**53 + 1
    column = joined(in_memory(x=[1, big, 3]), in_memory(y=[1, 2, 3], **second))["x"]
    assert column.dtype == dtype
    assert str(column.iloc[1]) == str(big)
    assert ("a float would round" in caplog.text) == (dtype == "category")


def test_conflicting_category_orders_are_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tables = [
        in_memory(x=pd.Categorical(["a", "b", None], categories=c, ordered=True)) for c in (["a", "b"], ["b", "a"])
    ]
    column = joined(*(MetadataInMemory(table.rows(0, 3)) for table in tables))["x"]
    assert not column.cat.ordered
    assert none_for_missing(column) == ["a", "b", None] * 2
    assert "the inputs order the categories of column 'x' differently" in caplog.text


def test_an_index_that_is_a_column_of_another_input_loses_its_name() -> None:
    frames = [pd.DataFrame({"x": [1, 2]}, index=pd.Index(["c0", "c1"], name="barcode")) for _ in range(2)]
    frames[1]["barcode"] = ["u", "v"]
    table = joined(*map(MetadataInMemory, frames))
    assert table.index.name is None
    assert list(table["barcode"].dropna()) == ["u", "v"]


def test_columns_are_in_order_of_first_appearance() -> None:
    first, second = in_memory(a=[1, 2, 3], b=[4, 5, 6]), in_memory(c=[7, 8, 9], b=[1, 2, 3], a=[0, 0, 0])
    table = joined(first, second)
    assert list(table.columns) == ["a", "b", "c"]
    assert table["b"].tolist() == [4, 5, 6, 1, 2, 3]
    assert list(joined(first, second, columns=["c", "a"]).columns) == ["a", "c"]


@pytest.mark.parametrize(("second", "expected"), [("barcode", "barcode"), ("cell", None), (None, None)])
def test_an_index_name_shared_by_all_inputs_is_kept(second: str | None, expected: str | None) -> None:
    frames = [pd.DataFrame({"x": [1, 2]}, index=pd.Index(["c0", "c1"], name=name)) for name in ("barcode", second)]
    table = joined(*map(MetadataInMemory, frames))
    assert table.index.name == expected
    assert list(table.index) == ["c0", "c1"] * 2


def test_a_single_table_is_unchanged() -> None:
    frame = frame_of_every_type()
    pd.testing.assert_frame_equal(joined(MetadataInMemory(frame)), frame)


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_files_with_different_columns_are_joined(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transcriptformer.runs.inputs.BLOCK_SIZE", 2)
    tables: list[dict[str, object]] = [
        {"name": ["x", "y", "z"], "age": [1, 2, 3], "is_ok": [True, False, True], "site": ["a", "b", "c"]},
        {"name": ["u", "u", None], "stage": pd.Categorical(["old", None, "new"])},
    ]
    paths = []
    for i, columns in enumerate(tables):
        adata = random_adata(3, seed=i)
        adata.obs = pd.DataFrame(columns, index=[f"{i}-{cell}" for cell in adata.obs_names])
        paths.append(tmp_path / f"{i}.h5ad")
        adata.write_h5ad(paths[-1])
    output = {"output_path": str(tmp_path), "output_filename": f"embeddings.{ending}"}
    written = run(
        paths, CHECKPOINT, load_config(CHECKPOINT, {f"model.inference_config.{k}": v for k, v in output.items()})
    )
    assert written is not None
    obs = (anndata.read_zarr(written) if ending == "zarr" else anndata.read_h5ad(written)).obs
    assert list(obs.columns) == ["name", "age", "is_ok", "site", "stage"]
    lists = {name: column.astype(object).where(column.notna(), None).tolist() for name, column in obs.items()}
    assert lists == {
        "name": ["x", "y", "z", "u", "u", None],
        "age": [1, 2, 3, None, None, None],
        "is_ok": [True, False, True, None, None, None],
        "site": ["a", "b", "c", None, None, None],
        "stage": [None, None, None, "old", None, "new"],
    }


def test_numbers_are_widened_by_dtype_not_by_the_first_rows() -> None:
    column = joined(in_memory(x=np.array([np.nan, 0.5, 1])), in_memory(x=[1, 2, 3]))["x"]
    assert none_for_missing(column) == [None, 0.5, 1, 1, 2, 3]


@pytest.mark.parametrize("is_categorical", [False, True])
def test_large_integers_in_categories_are_not_rounded_when_joined_with_floats(is_categorical: bool) -> None:
    large, other = 2**53 + 1, pd.Series([0.5, 2.0])
    tables = [
        pd.DataFrame({"id": pd.Categorical([large, 3])}),
        pd.DataFrame({"id": pd.Categorical(other) if is_categorical else other}),
    ]
    parts = [MetadataInMemory(table.set_axis(["a", "b"])) for table in tables]
    joined = JoinedMetadata(parts)
    assert str(joined.rows(0, 0, 2)["id"].iloc[0]) == str(large)


def test_numbers_out_of_the_joined_range_are_an_error() -> None:
    tables = [pd.DataFrame({"id": pd.Categorical(np.array([2**63, 1], np.uint64))}), pd.DataFrame({"id": [-1, 2]})]
    parts = [MetadataInMemory(table.set_axis(["a", "b"])) for table in tables]
    with pytest.raises(DataError, match="cannot join the inputs' tables"):
        JoinedMetadata(parts).rows(0, 0, 2)
