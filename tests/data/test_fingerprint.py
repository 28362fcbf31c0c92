"""Fingerprints differ if and only if the contents of inputs differ, wherever these are stored."""

import os
import shutil
from collections.abc import Callable, Generator
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import boto3
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr

from tests.data import test_store
from tests.h5ad_files import random_adata
from transcriptformer.data import fingerprint as module
from transcriptformer.data.fingerprint import fingerprint, fingerprint_file
from transcriptformer.errors import DataError, UsageError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding will be the default"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part in the Zarr format 3"),
]

stores, places = test_store.stores, test_store.places  # fixtures

SIZES = ["complete", "sampled"]


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether inputs count as small and are hashed completely, or as large and are sampled."""
    if request.param == "sampled":
        monkeypatch.setattr(module, "FULL_HASH_BYTES", 2**11)
        monkeypatch.setattr(module, "SMALL_ARRAY_BYTES", 2**9)
        monkeypatch.setattr(module, "BLOCK_BYTES", 2**8)
        monkeypatch.setattr(module, "N_BLOCKS", 8)
    return str(request.param)


def cells() -> anndata.AnnData:
    adata = random_adata(40)
    adata.obs["score"] = np.arange(40.0)
    adata.obs["donor"] = pd.Categorical(["a", "b"] * 20)
    adata.uns["note"] = "first"
    return adata


def write(adata: anndata.AnnData, path: Path, **options: Any) -> Path:
    getattr(adata, f"write_{path.suffix[1:]}")(path, **options)
    return path


def rename_cell(adata: anndata.AnnData) -> None:
    adata.obs_names = [*adata.obs_names[:-1], "c4x"]


def rename_gene(adata: anndata.AnnData) -> None:
    adata.var_names = [*adata.var_names[:-1], "g19x"]


def rename_category(adata: anndata.AnnData) -> None:
    adata.obs["donor"] = adata.obs["donor"].cat.rename_categories({"b": "c"})


def reorder_categories(adata: anndata.AnnData) -> None:
    adata.obs["donor"] = adata.obs["donor"].cat.reorder_categories(["b", "a"])


def change_score(adata: anndata.AnnData) -> None:
    adata.obs["score"] += 1


def change_counts(adata: anndata.AnnData) -> None:
    adata.X.data += 1


def change_type(adata: anndata.AnnData) -> None:
    adata.X = adata.X.astype(np.int32)


def swap_rows(adata: anndata.AnnData) -> None:
    adata.X = adata.X[::-1].tocsr()


def change_attribute(adata: anndata.AnnData) -> None:
    adata.obs["donor"] = adata.obs["donor"].cat.as_ordered()


def rename_column(adata: anndata.AnnData) -> None:
    adata.obs = adata.obs.rename(columns={"score": "scare"})


CHANGES = [
    *(rename_cell, rename_gene, rename_category, reorder_categories, change_score),
    *(change_counts, change_type, swap_rows, change_attribute, rename_column),
]


@pytest.mark.parametrize(
    ("name", "change"),
    [*(("cells.h5ad", change) for change in CHANGES), *(("cells.zarr", change) for change in CHANGES[::3])],
)
def test_changes_are_detected(name: str, change: Callable[[anndata.AnnData], None], size: str, tmp_path: Path) -> None:
    adata = cells()
    before = fingerprint(write(adata, tmp_path / name))
    change(adata)
    assert fingerprint(write(adata, tmp_path / f"other-{name}")) != before


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("name", ["cells.h5ad", "cells.zarr"])
def test_path_and_modification_time_do_not_matter(
    name: str, compression: str | None, size: str, tmp_path: Path
) -> None:
    options = {"compression": compression} if name.endswith("h5ad") else {}
    path = write(cells(), tmp_path / name, **options)
    before = fingerprint(path)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / f"moved-{name}"
    (shutil.copytree if path.is_dir() else shutil.copy)(path, moved)
    os.utime(moved, (1, 1))
    assert fingerprint(moved) == before == fingerprint(path)
    assert len(before) == 64


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.zarr"])
def test_every_changed_count_of_a_small_input_is_detected(name: str, tmp_path: Path) -> None:
    path = write(cells(), tmp_path / name)
    found = {fingerprint(path)}
    for entry in (0, 100, 777):
        root: Any = zarr.open_group(str(path)) if path.is_dir() else h5py.File(path, "r+")
        root["X/data"][entry] += 1
        if path.is_file():
            root.close()
        found.add(fingerprint(path))
    assert len(found) == 4


def test_changes_of_compressed_chunks_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FULL_HASH_BYTES", 2**11)
    monkeypatch.setattr(module, "N_BLOCKS", 1)  # the first only
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**8)
    monkeypatch.setattr(module, "SMALL_ARRAY_BYTES", 0)
    path = tmp_path / "cells.h5ad"
    found = set()
    for value in (1, 2):
        counts = np.ones(100_000, np.float32)
        counts[-5:] = np.arange(5) * value
        with h5py.File(path, "w") as file:
            file.create_dataset("X/data", data=counts, chunks=(1000,), compression="gzip")
            file.create_dataset("padding", data=np.arange(2**14))
        found.add(fingerprint(path))
    assert len(found) == 2


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("place", ["http", "s3"])
def test_remote_stores_have_a_fingerprint(place: str, zarr_format: int, places: dict[str, str], size: str) -> None:
    location = f"{places[place]}/v{zarr_format}.zarr"
    assert fingerprint(location) == fingerprint(location)
    assert len(fingerprint(location)) == 64
    with pytest.raises(UsageError, match="cannot be read as a zarr store"):
        fingerprint(f"{places[place]}/nothing.zarr")


def test_s3_content_hashes_detect_any_change(places: dict[str, str]) -> None:
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])
    client.create_bucket(Bucket="changing")
    store = Path(places["folder"]) / "v2.zarr"
    files = [path for path in store.rglob("*") if path.is_file()]
    for place in ("a.zarr", "elsewhere/b.zarr"):
        for path in files:
            client.upload_file(str(path), "changing", f"{place}/{path.relative_to(store)}")
    before = fingerprint("s3://changing/a.zarr")
    assert fingerprint("s3://changing/elsewhere/b.zarr") == before
    data = store / "X" / "data" / "0"
    client.put_object(Bucket="changing", Key="a.zarr/X/data/0", Body=data.read_bytes()[:-1] + b"x")
    assert fingerprint("s3://changing/a.zarr") != before
    client.close()


@pytest.mark.parametrize("consolidated", [True, False])
def test_web_servers_without_listing_work(consolidated: bool, tmp_path: Path) -> None:
    found = set()
    for counts in ("first", "second"):
        adata = cells()
        if counts == "second":
            change_counts(adata)
        path = write(adata, tmp_path / f"{counts}.zarr")
        if not consolidated:
            (path / ".zmetadata").unlink()
        with test_store.serve(tmp_path, test_store.HandlerWithoutListing) as address:
            found.add(fingerprint(f"{address}/{counts}.zarr"))
    assert len(found) == 2


def test_other_files_and_folders_have_fingerprints(tmp_path: Path, size: str) -> None:
    folder = tmp_path / "mtx"
    folder.mkdir()
    for name in ("matrix.mtx", "barcodes.tsv"):
        (folder / name).write_bytes(name.encode() * 1000)
    before, file_before = fingerprint(folder), fingerprint_file(folder / "matrix.mtx")
    assert fingerprint(folder / "matrix.mtx") == file_before != fingerprint_file(folder / "barcodes.tsv")
    (folder / "matrix.mtx").write_bytes(b"matrix.mtX" * 1000)
    assert fingerprint(folder) != before
    assert fingerprint_file(folder / "matrix.mtx") != file_before


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FULL_HASH_BYTES", 2**20)
    path = tmp_path / "weights.bin"
    with path.open("wb") as file:
        file.truncate(2**30)  # sparse
    before = fingerprint_file(path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert fingerprint_file(path) != before


def test_changed_link_targets_are_detected(size: str, tmp_path: Path) -> None:
    path = write(cells(), tmp_path / "cells.h5ad")
    found = set()
    for target in ("/layers/first", "/layers/other"):
        with h5py.File(path, "r+") as file:
            if "layers/first" not in file:
                file["layers/first"] = file["X/data"][:]
                file["layers/other"] = file["X/data"][:][::-1]
            if "layers/counts" in file:
                del file["layers/counts"]
            file["layers/counts"] = h5py.SoftLink(target)
        found.add(fingerprint(path))
    assert len(found) == 2


def test_changes_of_linked_files_are_detected(tmp_path: Path) -> None:
    other, path = tmp_path / "other.h5", tmp_path / "cells.h5ad"
    found = set()
    with h5py.File(path, "w") as file:
        file["X"] = h5py.ExternalLink("other.h5", "/X")
        layout = h5py.VirtualLayout((3,), "f4")
        layout[:] = h5py.VirtualSource("virtual.h5", "X", (3,), "f4")
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("raw", (3,), "f4", external=[(str(tmp_path / "raw.bin"), 0, 12)])
    found.add(fingerprint(path))
    for name in (other, tmp_path / "virtual.h5"):
        with h5py.File(name, "w") as file:
            file["X"] = np.arange(3, dtype="f4")
        found.add(fingerprint(path))
    (tmp_path / "raw.bin").write_bytes(bytes(12))
    found.add(fingerprint(path))
    assert len(found) == 4


def test_changes_of_indirectly_linked_files_are_detected(tmp_path: Path) -> None:
    path, last = tmp_path / "cells.h5ad", tmp_path / "last.h5"
    chain = [path, tmp_path / "second.h5", tmp_path / "third.h5", last]
    for name, following in pairwise(chain):
        with h5py.File(name, "w") as file:
            file["X"] = h5py.ExternalLink(following.name, "/X")
            file["back"] = h5py.ExternalLink(path.name, "/X")
    found = {fingerprint(path)}
    for value in (1, 2):
        with h5py.File(last, "w") as file:
            file["X"] = np.full(3, value)
        found.add(fingerprint(path))
    content = last.read_bytes()
    for end in (-1, -2):
        last.write_bytes(content[:end])  # damaged
        found.add(fingerprint(path))
    assert len(found) == 5


def test_changes_in_linked_folders_are_detected(tmp_path: Path, size: str) -> None:
    path = write(cells(), tmp_path / "cells.zarr")
    before = fingerprint(path)
    (path / "X").rename(tmp_path / "X")
    (path / "X").symlink_to("../X")
    assert fingerprint(path) == before
    (tmp_path / "X" / "data").rename(tmp_path / "data")
    (tmp_path / "X" / "data").symlink_to(tmp_path / "data")
    assert fingerprint(path) == before
    array: Any = zarr.open_array(str(tmp_path / "data"))
    array[0] += 1
    assert fingerprint(path) != before


def test_folders_that_link_to_each_other_terminate(tmp_path: Path) -> None:
    folder = tmp_path / "cells"
    for i in range(30):  # 2³⁰ paths
        (folder / str(i)).mkdir(parents=True)
        (folder / str(i) / "x").write_bytes(b"first")
        for name in "ab":
            (folder / str(i) / name).symlink_to(f"../{i + 1}")
    (folder / "3" / "up").symlink_to("..")
    (folder / "3" / "itself").symlink_to("itself")
    found = {fingerprint(folder)}
    (folder / "29" / "x").write_bytes(b"other")
    found.add(fingerprint(folder))
    (folder / "5" / "b").unlink()
    (folder / "5" / "b").symlink_to("../7")
    found.add(fingerprint(folder))
    assert len(found) == 3


def test_objects_that_anndata_cannot_read_have_fingerprints(tmp_path: Path, size: str) -> None:
    path = tmp_path / "odd.h5"
    with h5py.File(path, "w") as file:
        file["group/again"] = file.create_group("loop")
        file["loop/up"] = h5py.SoftLink("/nowhere")
        file["null"] = h5py.Empty("f4")
        file["empty"] = np.zeros((0, 3))
        file["scalar"] = 3
        file["latin1"] = np.array([b"M\xfcller", b"x"])
        file.attrs["latin1"] = np.bytes_(b"M\xfcller")
        table = np.zeros(300, [("name", h5py.string_dtype()), ("n", "i4")])
        table["name"] = b"a"
        file["table"] = table
        file["many"] = np.array([b"%d" % i for i in range(5000)], object)
    before = fingerprint(path)
    with h5py.File(path, "r+") as file:
        file["table"][0] = (b"b", 0)
    assert fingerprint(path) != before


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    path = write(cells(), tmp_path / "cells.h5ad")
    undamaged = fingerprint(path)
    path.write_bytes(path.read_bytes()[:-2000])
    assert fingerprint(path) != undamaged  # damage is reported by the reader
    with pytest.raises((DataError, UsageError), match=r"nothing\.h5ad"):
        fingerprint(tmp_path / "nothing.h5ad")


def test_lack_of_memory_does_not_change_a_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(cells(), tmp_path / "cells.h5ad")

    def fail(*unused: object) -> Generator[None]:
        raise MemoryError("1 PiB")
        yield

    monkeypatch.setattr(module, "FULL_HASH_BYTES", 1000)
    monkeypatch.setattr(module, "_add_hierarchy", fail)
    with pytest.raises(DataError, match=r"cells\.h5ad: cannot be read: not enough memory .*1 PiB"):
        fingerprint(path)
