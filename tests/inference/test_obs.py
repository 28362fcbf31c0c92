"""Unreadable or unwritable metadata is an error before any cell is computed; fixable metadata is fixed."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from typer.testing import CliRunner

import transcriptformer as tf
from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import make_adata, random_adata
from tests.training.training_runs import config_of
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.cli.main import app
from transcriptformer.data.metadata import ColumnError
from transcriptformer.data.row_stream import check_writable_rows
from transcriptformer.errors import DataError
from transcriptformer.inference.embeddings import describe
from transcriptformer.inference.run import embed, run
from transcriptformer.training.run import fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part in the Zarr format 3"),
    pytest.mark.filterwarnings("ignore:The `dtype` .* is currently not part in the Zarr format 3"),
]

N_CELLS = 7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two cells, so that errors come late."""
    for module in ("runs.inputs", "data.joined"):
        monkeypatch.setattr(f"transcriptformer.{module}.BLOCK_SIZE", 2)


def cells() -> anndata.AnnData:
    adata = random_adata(N_CELLS)
    adata.obs["donor"] = pd.Categorical(list("ababbaa"))
    adata.obs["note"] = pd.array(list("uvwxyzu"), dtype=object)
    adata.obs["score"] = np.arange(N_CELLS, dtype=np.float32)
    return adata


def write(path: Path, change: Callable[[Any], None] | None = None, adata: anndata.AnnData | None = None) -> Path:
    """Write cells to a file, then change its obs in place."""
    adata = cells() if adata is None else adata
    getattr(adata, f"write_{path.suffix[1:]}")(path, convert_strings_to_categoricals=False)
    if change is None:
        return path
    if path.suffix == ".zarr":
        root = zarr.open_group(str(path), mode="r+", use_consolidated=False)
        change(root["obs"])
        zarr.consolidate_metadata(root.store)
    else:
        with h5py.File(path, "r+") as file:
            change(file["obs"])
    return path


def replace(group: Any, name: str, values: Any, **attributes: object) -> None:
    """Replace an array, keeping its attributes."""
    kept = {**dict(group[name].attrs), **attributes}
    del group[name]
    if isinstance(group, zarr.Group):
        group.create_array(name, data=values)
    else:
        group.create_dataset(name, data=values)
    group[name].attrs.update(kept)


def add_column(obs: Any, name: str) -> None:
    obs.attrs["column-order"] = [*obs.attrs["column-order"], name]


def inference(paths: list[Path], output: Path, progress: list[Any] | None = None, **options: Any) -> anndata.AnnData:
    settings = {f"model.inference_config.{name}": value for name, value in options.items()}
    config = load_config(CHECKPOINT, {**settings, "model.inference_config.output_path": str(output)})
    written = run(paths, CHECKPOINT, config, None if progress is None else lambda *done: progress.append(done))
    assert written is not None
    assert describe(written)
    return anndata.read_zarr(written) if written.suffix == ".zarr" else anndata.read_h5ad(written)


def refusals(paths: list[Path], *options: str) -> list[str | None]:
    result = CliRunner().invoke(app, ["check", *map(str, paths), *options, "--json"], catch_exceptions=False)
    logging.getLogger("transcriptformer").setLevel(logging.INFO)  # `check` raises it permanently
    return [file["refused"] for file in json.loads(result.stdout)["files"]]


def large_code(obs: Any) -> None:
    obs["donor/codes"][4] = 99


def small_code(obs: Any) -> None:
    obs["donor/codes"][4] = -2


def two_dimensional(obs: Any) -> None:
    replace(obs, "score", np.zeros((N_CELLS, 3)))


def latin1(obs: Any) -> None:
    replace(obs, "note", np.array([b"a", b"a", b"a", b"a", b"d\xe9", b"a", b"a"], "S2").astype(h5py.string_dtype()))


def latin1_category(obs: Any) -> None:
    replace(obs["donor"], "categories", np.array([b"a", b"d\xe9"], "S2").astype(h5py.string_dtype()))


def records(obs: Any) -> None:
    replace(obs, "score", np.zeros(N_CELLS, [("a", "f4"), ("b", "i4")]))


def sparse_column(obs: Any) -> None:
    del obs["score"]
    obs.create_group("score").attrs["encoding-type"] = "csr_matrix"


def absent_column(obs: Any) -> None:
    del obs["score"]


def short_column(obs: Any) -> None:
    replace(obs, "score", np.zeros(N_CELLS - 1))


def reserved_name(obs: Any) -> None:
    obs["barcode"] = obs["_index"][:]
    obs["barcode"].attrs.update(dict(obs["_index"].attrs))
    obs.attrs["_index"] = "barcode"
    add_column(obs, "_index")


def nameless_column(obs: Any) -> None:
    add_column(obs, "")


def opaque(obs: Any) -> None:
    replace(obs, "score", np.zeros(N_CELLS, "V8"))


BROKEN: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "code too large": (large_code, "donor", r"'donor' has 2 categories, but cell 'c4' \(row 4\) has category code 99"),
    "code too small": (small_code, "donor", r"'donor' has 2 categories, but cell 'c4' \(row 4\) has category code -2"),
    "two-dimensional": (two_dimensional, "score", r"'score' is an array of shape \(7, 3\)"),
    "text in Latin-1": (latin1, "note", r"'note' contains text that is not UTF-8, b'd\\xe9', in cell 'c4' \(row 4\)"),
    "category in Latin-1": (latin1_category, "donor", r"'donor' contains text that is not UTF-8, b'd\\xe9'"),
    "records": (records, "score", "'score' contains records of a, b"),
    "opaque": (opaque, "score", "'score' contains records"),
    "sparse": (sparse_column, "score", "'score' is stored as csr_matrix"),
    "absent": (absent_column, "score", "'score' cannot be read"),
    "short": (short_column, "score", "damaged: obs has 7 rows, but its column 'score' has 6"),
    "reserved name": (reserved_name, "_index", "column '_index' cannot be written.*reserved"),
    "no name": (nameless_column, "", "column '' cannot be read"),
}


@pytest.fixture(params=BROKEN)
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str]:
    change, column, message = BROKEN[request.param]
    return write(tmp_path / "cells.h5ad", change), column, message


def test_a_broken_column_is_named_before_anything_is_computed(broken: tuple[Path, str, str], tmp_path: Path) -> None:
    path, _, message = broken
    progress: list[Any] = []
    with pytest.raises(
        DataError, match=rf"cells\.h5ad.*{message}.*fix the column or drop it: --config-override"
    ) as error:
        inference([path], tmp_path / "out", progress)
    assert "\n" not in str(error.value)
    assert not progress
    assert not list((tmp_path / "out").iterdir())
    if "reserved" in message:  # allowed in memory
        return
    with pytest.raises(DataError, match=message):
        embed([write(tmp_path / "good.h5ad"), path], load_checkpoint(CHECKPOINT, load_config(CHECKPOINT)))


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_check_reports_the_same_errors(step: int, tmp_path: Path) -> None:
    broken = dict(list(BROKEN.items())[::step])
    paths, errors = list[Path](), list[str]()
    for name, (change, _, _) in broken.items():
        paths.append(write(tmp_path / f"{name}.h5ad", change))
        with pytest.raises(DataError) as raised:
            inference(paths[-1:], tmp_path / "out")
        errors.append(str(raised.value))
    assert refusals(paths, "--checkpoint-path", str(CHECKPOINT)) == errors
    assert all(refusal and error.startswith(refusal) for refusal, error in zip(refusals(paths), errors, strict=True))
    left = [path for path, (_, column, _) in zip(paths, broken.values(), strict=True) if column != "note"]
    keys = ["--config-override", "model.inference_config.obs_keys=[assay,note]"]
    assert refusals(left, "--checkpoint-path", str(CHECKPOINT), *keys) == [None] * len(left)


@pytest.mark.slow
def test_a_broken_column_that_is_dropped_does_not_matter(broken: tuple[Path, str, str], tmp_path: Path) -> None:
    path, column, _ = broken
    with pytest.raises(DataError) as error:
        inference([path], tmp_path / "out")
    advice = str(error.value).partition('--config-override "')[2].rstrip('"')
    written = run(
        [path], CHECKPOINT, load_config(CHECKPOINT, {"model.inference_config.output_path": str(tmp_path)}, [advice])
    )
    assert written is not None
    left = [name for name in ("assay", "donor", "note", "score") if name != column]
    result = anndata.read_h5ad(written)
    assert list(result.obs.columns) == left
    pd.testing.assert_frame_equal(result.obs, cells().obs.astype({"assay": object})[left], check_names=False)
    pooled = inference([path], tmp_path / "pooled", emb_type="cge", cge_pool="assay")  # does not read the column
    assert set(pooled.obs["assay"]) == {"10x multiome"}


def test_a_broken_column_breaks_pools_of_it(tmp_path: Path) -> None:
    for name, column in (("code too large", "donor"), ("text in Latin-1", "note"), ("two-dimensional", "score")):
        change, _, message = BROKEN[name]
        path, progress = write(tmp_path / f"{column}.h5ad", change), list[Any]()
        with pytest.raises(DataError, match=message):
            inference([path], tmp_path / "out", progress, emb_type="cge", cge_pool=column)
        assert not progress


def test_a_broken_column_breaks_training_on_it(tmp_path: Path) -> None:
    path = write(tmp_path / "cells.h5ad", large_code)
    with pytest.raises(DataError, match=r"cells\.h5ad: obs: column 'donor' has 2 categories, but cell 'c4'"):
        fit(config_of(tmp_path / "run", path, start=CHECKPOINT, label_column="donor"))


def test_a_broken_auxiliary_column_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "cells.h5ad", lambda obs: replace(obs, "assay", np.zeros((N_CELLS, 2))))
    with pytest.raises(DataError, match=r"column 'assay' is an array of shape \(7, 2\)"):
        inference([path], tmp_path / "out", obs_keys=["donor"])


def repeated_categories(obs: Any) -> None:
    replace(obs["donor"], "categories", np.array([3, 3]))


def missing_category(obs: Any) -> None:
    replace(obs["donor"], "categories", np.array([1.5, np.nan]))


def one_column(obs: Any) -> None:
    replace(obs, "score", np.arange(N_CELLS, dtype=np.float32)[:, None])


def ascii_that_is_utf8(obs: Any) -> None:
    values = np.array(["ä".encode()] * N_CELLS, object)
    del obs["note"]
    obs.create_dataset("note", data=values, dtype=h5py.string_dtype("ascii"))


def big_endian(obs: Any) -> None:
    replace(obs, "score", np.arange(N_CELLS, dtype=">f4"))


def repeated_name(obs: Any) -> None:
    add_column(obs, "score")


def index_among_columns(obs: Any) -> None:
    add_column(obs, "_index")


@pytest.mark.parametrize(
    ("change", "column", "expected", "warning"),
    [
        (repeated_categories, "donor", [3] * N_CELLS, r"column 'donor' has duplicate categories \(3\)"),
        (missing_category, "donor", [1.5, None, 1.5, None, None, 1.5, 1.5], "column 'donor' has a missing category"),
        (one_column, "score", [0, 1, 2, 3, 4, 5, 6], "column 'score' is an array of shape"),
        (ascii_that_is_utf8, "note", ["ä"] * N_CELLS, ""),
        (big_endian, "score", [0, 1, 2, 3, 4, 5, 6], ""),
        (repeated_name, "score", [0, 1, 2, 3, 4, 5, 6], ""),
        (index_among_columns, "score", [0, 1, 2, 3, 4, 5, 6], ""),
    ],
)
@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_fixable_columns_are_fixed_with_a_warning(
    change: Callable[[Any], None],
    column: str,
    expected: list[Any],
    warning: str,
    ending: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write(tmp_path / "cells.h5ad", change)
    result = inference([path], tmp_path, output_filename=f"result.{ending}")
    found = result.obs[column]
    assert found.astype(object).where(found.notna(), None).tolist() == expected
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len([message for message in warnings if "column" in message]) == bool(warning), warnings
    if warning:
        assert any(pd.Series(warnings).str.contains(warning))


@pytest.mark.parametrize("index", ["int", "categorical", "nullable"])
def test_cell_names_become_strings(index: str, tmp_path: Path) -> None:
    names = {
        "int": (np.arange(N_CELLS) * 3, [str(i * 3) for i in range(N_CELLS)]),
        "categorical": (pd.Categorical([f"x{i}" for i in range(N_CELLS)]), [f"x{i}" for i in range(N_CELLS)]),
        "nullable": (pd.array(list("abcdefg"), dtype="string"), list("abcdefg")),
    }
    stored, expected = names[index]

    def change(obs: Any) -> None:
        del obs["_index"]
        with anndata.settings.override(allow_write_nullable_strings=True):
            anndata.io.write_elem(obs, "_index", stored)

    path = write(tmp_path / "cells.h5ad", change)
    result = inference([path], tmp_path / "out")
    assert list(result.obs_names) == expected
    assert refusals([path]) == [None]


def test_a_cell_without_a_name_is_an_error(tmp_path: Path) -> None:
    def change(obs: Any) -> None:
        del obs["_index"]
        with anndata.settings.override(allow_write_nullable_strings=True):
            anndata.io.write_elem(obs, "_index", pd.array(["a", "b", "c", None, "e", "f", "g"], dtype="string"))

    with pytest.raises(DataError, match=r"cells\.h5ad: obs: the cell in row 3 has no name; set adata\.obs_names"):
        inference([write(tmp_path / "cells.h5ad", change)], tmp_path / "out")


@pytest.mark.parametrize(
    ("index_name", "ending"),
    [
        ("codes", "zarr"),
        *((name, "h5ad") for name in ("codes", "categories", "any")),
        *(pytest.param(name, "zarr", marks=pytest.mark.slow) for name in ("categories", "any")),
    ],
)
def test_columns_may_have_any_name(index_name: str, ending: str, tmp_path: Path) -> None:
    adata = cells()
    for name in {"categories", "codes", "values", "mask", "index", "obs", "a b", "é", ".hidden"} - {index_name}:
        adata.obs[name] = adata.obs["donor"]
    adata.obs.index.name = index_name
    path = write(tmp_path / "cells.h5ad", adata=adata)
    result = inference([path], tmp_path, output_filename=f"result.{ending}")
    pd.testing.assert_frame_equal(
        result.obs, anndata.read_h5ad(path).obs, check_dtype=ending == "h5ad", check_index_type=False
    )


def test_predictions_overwrite_columns_of_the_same_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = fit(
        config_of(
            tmp_path / "run", write(tmp_path / "cells.h5ad"), start=CHECKPOINT, label_column="donor", max_epochs=1
        )
    )
    assert trained is not None
    adata = cells()
    adata.obs["predicted_donor"] = np.zeros(N_CELLS)
    adata.obs["predicted_donor_probability"] = "text"
    path = write(tmp_path / "again.h5ad", adata=adata)
    config = load_config(trained.checkpoint, {"model.inference_config.output_path": str(tmp_path)})
    written = run([path], trained.checkpoint, config)
    assert written is not None
    obs = anndata.read_h5ad(written).obs
    assert set(obs["predicted_donor"]) <= {"a", "b"}
    assert obs["predicted_donor_probability"].between(0.5, 1).all()
    assert "obs already has a column 'predicted_donor'; it is replaced by the results" in caplog.text


def test_a_pool_column_must_not_conflict_with_output_columns(tmp_path: Path) -> None:
    adata = cells()
    adata.obs["n_cells"] = list("abababa")
    path = write(tmp_path / "cells.h5ad", adata=adata)
    with pytest.raises(DataError, match="--cge-pool n_cells: conflicts with the output column 'n_cells'"):
        inference([path], tmp_path / "out", emb_type="cge", cge_pool="n_cells")
    with pytest.raises(DataError, match="conflicts with the output column 'n_cells'"):
        tf.gene_embeddings(adata, tf.load(CHECKPOINT, device="cpu"), pool="n_cells")


def test_a_summary_counts_cells_regardless_of_columns(tmp_path: Path) -> None:
    adata = cells()
    adata.obs["gene"], adata.obs["n_cells"] = "x", 1
    config = load_config(CHECKPOINT, {"model.inference_config.output_path": str(tmp_path)})
    written = run([write(tmp_path / "cells.h5ad", adata=adata)], CHECKPOINT, config)
    assert written is not None
    assert describe(written).startswith("7 cells: ")


VALUES: dict[str, Any] = {
    "intervals": pd.arrays.IntervalArray.from_breaks(range(4)),
    "dates": pd.date_range("2024-01-01", periods=3),
    "time zones": pd.date_range("2024-01-01", periods=3, tz="Europe/Berlin"),
    "durations": pd.to_timedelta([1, 2, 3], unit="s"),
    "periods": pd.period_range("2024", periods=3),
    "lists": pd.Series([[1], [2], [3]]).array,
    "nullable floats": pd.array([0.5, None, 1], dtype="Float64"),
    "sparse": pd.arrays.SparseArray([0, 0, 1]),
    "categories of different kinds": pd.Categorical([1, "a", True]),
}
LATE: dict[str, Any] = {
    "numbers beside text": ["a", "b", 1],
    "text beside a gap": ["a", "b", np.nan],
    "bytes": ["a", "b", b"\xff"],
    "dict": ["a", "b", {}],
}


@pytest.mark.parametrize("as_zarr", [False, True])
@pytest.mark.parametrize("kind", VALUES)
def test_unwritable_values_are_named(kind: str, as_zarr: bool) -> None:
    """Values that anndata rejects, or that do not round-trip."""
    table = pd.DataFrame({"x": [1, 2, 3], "odd": VALUES[kind]}, index=["c0", "c1", "c2"])
    blocks = [("cells.h5ad", 0, table[:2]), ("cells.h5ad", 2, table[2:])]
    with pytest.raises(ColumnError, match=r"cells\.h5ad: obs: column 'odd' cannot be written \(.+\)") as error:
        check_writable_rows(blocks, 3, as_zarr)
    assert error.value.column == "odd"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", LATE)
def test_the_first_unwritable_value_is_named(kind: str) -> None:
    table = pd.DataFrame({"x": [1, 2, 3], "odd": pd.array(LATE[kind], dtype=object)}, index=["c0", "c1", "c2"])
    blocks = [("cells.h5ad", 10, table[:2]), ("cells.h5ad", 12, table[2:])]
    with pytest.raises(ColumnError, match=r"column 'odd' cannot .*, first in cell 'c2' \(row 12\)"):
        check_writable_rows(blocks, 3, as_zarr=False)
    check_writable_rows([("cells.h5ad", 0, table.drop(columns="odd"))], 3, as_zarr=False)


def test_blocks_must_have_the_same_types() -> None:
    tables = [pd.DataFrame({"x": values}, index=["a", "b"]) for values in ([1, 2], [0.5, 1])]
    with pytest.raises(ColumnError, match="x is float64, but int64 in the first rows"):
        check_writable_rows([("1", 0, tables[0]), ("2", 0, tables[1])], 4, as_zarr=False)
    tables = [pd.DataFrame({"x": pd.Categorical(values)}, index=["a", "b"]) for values in (["a", "b"], ["a", "c"])]
    with pytest.raises(ColumnError, match="column 'x' has different categories than in the first rows"):
        check_writable_rows([("1", 0, tables[0]), ("2", 0, tables[1])], 4, as_zarr=False)


def test_a_duplicate_column_of_an_anndata_is_named() -> None:
    adata = make_adata([[1], [2]])
    adata.obs = pd.DataFrame([["a", 1, 2]] * 2, index=adata.obs_names, columns=["assay", "x", "x"])
    model = tf.load(CHECKPOINT, device="cpu")
    with pytest.raises(DataError, match="column name 'x' is not unique; rename the duplicates"):
        tf.embed([adata], model)
    tf.embed(adata, model)  # does not read obs
    assert "X_transcriptformer" in adata.obsm


COLUMN_KINDS: dict[str, Any] = {
    "text": ["a", "b", "1"],
    "text categories": pd.Categorical(["b", "a", None]),
    "int": [1, 2, 3],
    "int categories": pd.Categorical([7, 8, None]),
    "nullable int": pd.array([4, 5, None], dtype="Int32"),
    "float": np.array([0.5, 2, np.nan]),
    "bool": [True, False, True],
    "bool categories": pd.Categorical([True, False, None]),
    "ordered": pd.Categorical(["a", "b", None], categories=["b", "a"], ordered=True),
    "absent": None,
}


@pytest.mark.parametrize(
    "first", [kind if i % 3 == 0 else pytest.param(kind, marks=pytest.mark.slow) for i, kind in enumerate(COLUMN_KINDS)]
)
def test_columns_of_different_kinds_are_joined(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair of kinds, one column each."""
    paths = []
    for i in range(2):
        adata = random_adata(3, seed=i)
        adata.obs_names = [f"{i}-{cell}" for cell in adata.obs_names]
        for second, values in COLUMN_KINDS.items():
            column = values if i else COLUMN_KINDS[first]
            if column is not None:
                adata.obs[second] = column
        paths.append(write(tmp_path / f"{i}.h5ad", adata=adata))
    obs = inference(paths, tmp_path).obs
    for second, values in COLUMN_KINDS.items():
        if second not in obs:
            assert first == second == "absent"
            continue
        stored = [None] * 3 if COLUMN_KINDS[first] is None else list(COLUMN_KINDS[first])
        expected = [*stored, *([None] * 3 if values is None else values)]
        found = obs[second].astype(object).where(obs[second].notna(), None).tolist()
        expected = [None if pd.isna(value) else value for value in expected]
        assert found in (expected, [None if value is None else str(value) for value in expected]), second
