"""Reading AnnData from files and from zarr stores on disk, over HTTP and in S3."""

import functools
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anndata
import boto3
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem
from scipy import sparse

from tests.golden_cases import CHECKPOINT, TOLERANCE, relative_error
from tests.h5ad_files import random_adata
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.data.source import CellSource, open_source
from transcriptformer.data.store import Store
from transcriptformer.errors import DataError, UsageError
from transcriptformer.inference.run import embed

pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding will be the default"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part in the Zarr format 3"),
]

N_CELLS, N_GENES = 30, 60
BLOCKS = [(0, 30), (0, 1), (7, 20), (29, 30)]
PLACES = ["folder", "http", "s3"]


def the_cells() -> anndata.AnnData:
    adata = random_adata(N_CELLS, n_genes=N_GENES)
    adata.X = adata.X.multiply((np.arange(N_CELLS) != 3)[:, None]).tocsr()  # one is empty
    adata.obs["donor"] = pd.Categorical(np.where(np.arange(N_CELLS) % 3, "A", "B"))
    return adata


def write_zarr(adata: anndata.AnnData, path: Path, zarr_format: int) -> None:
    with anndata.settings.override(zarr_write_format=zarr_format):
        adata.write_zarr(path)


OPEN_SESSIONS: list[object] = []
"""File systems with sessions that are never closed, kept to avoid warnings when they are collected."""


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *unused: object) -> None:
        pass


@contextmanager
def serve(folder: Path, handler: type[QuietHandler] = QuietHandler) -> Iterator[str]:
    web = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{web.server_port}"
    finally:
        web.shutdown()
        thread.join()
        web.server_close()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the same cells in both zarr formats."""
    folder = tmp_path_factory.mktemp("stores")
    for zarr_format in (2, 3):
        write_zarr(the_cells(), folder / f"v{zarr_format}.zarr", zarr_format)
    return folder


@pytest.fixture(scope="module")
def places(stores: Path) -> Iterator[dict[str, str]]:
    """Locations of that folder: a path, an HTTP URL and an S3 URL."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    with serve(stores) as web, pytest.MonkeyPatch.context() as patch:
        endpoint = "http://{}:{}".format(*moto.get_host_and_port())
        # Settings of users with their own S3 storage.
        patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="cells")
        for path in stores.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "cells", str(path.relative_to(stores)))
        client.close()
        yield {"folder": str(stores), "http": web, "s3": "s3://cells"}
    moto.stop()
    OPEN_SESSIONS.extend(S3FileSystem._cache.values())
    S3FileSystem.clear_instance_cache()  # instances would keep using this server


class HandlerWithoutListing(QuietHandler):
    def list_directory(self, *unused: object) -> None:
        self.send_error(403)


@pytest.mark.parametrize("consolidated", [True, False])
def test_web_servers_without_listing_work(consolidated: bool, tmp_path: Path) -> None:
    write_zarr(the_cells(), tmp_path / "cells.zarr", 2)
    if not consolidated:
        (tmp_path / "cells.zarr" / ".zmetadata").unlink()
    with serve(tmp_path, HandlerWithoutListing) as address:
        assert_holds_the_cells(open_source(f"{address}/cells.zarr"))


def assert_holds_the_cells(source: CellSource) -> None:
    expected = the_cells()
    assert list(source.gene_ids) == expected.var["ensembl_id"].tolist()
    assert len(source) == N_CELLS
    for start, stop in BLOCKS:
        np.testing.assert_array_equal(source.counts(start, stop).toarray(), expected.X[start:stop].toarray())
        obs = source.obs.rows(start, stop)
        pd.testing.assert_frame_equal(obs, expected.obs.iloc[start:stop].astype({"assay": obs["assay"].dtype}))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("place", PLACES)
def test_local_and_remote_stores_are_read(place: str, zarr_format: int, places: dict[str, str]) -> None:
    assert_holds_the_cells(open_source(f"{places[place]}/v{zarr_format}.zarr"))


@pytest.mark.parametrize("place", PLACES)
def test_workers_read_local_and_remote_stores(place: str, places: dict[str, str]) -> None:
    options = {"model.data_config.n_data_workers": 2, "model.data_config.block_size": 5}
    config = load_config(CHECKPOINT, {**options, "model.inference_config.precision": "32"})
    checkpoint = load_checkpoint(CHECKPOINT, config)
    result = embed(f"{places[place]}/v3.zarr", checkpoint)
    expected = embed(the_cells(), checkpoint)
    assert list(result.obs_names) == list(expected.obs_names)
    assert relative_error(result.obsm["embeddings"], expected.obsm["embeddings"]) < TOLERANCE


@pytest.mark.parametrize("place", PLACES)
def test_sources_can_be_pickled(place: str, places: dict[str, str]) -> None:
    source = open_source(f"{places[place]}/v3.zarr")
    source.counts(0, 1)
    assert_holds_the_cells(pickle.loads(pickle.dumps(source)))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_parent_and_forked_child_can_read_the_same_file(tmp_path: Path) -> None:
    the_cells().write_h5ad(tmp_path / "cells.h5ad")
    source = open_source(tmp_path / "cells.h5ad")
    source.counts(0, 1)
    child = os.fork()
    if child == 0:
        exit_code = 1
        try:
            for _ in range(5):
                assert_holds_the_cells(source)
            exit_code = 0
        finally:
            os._exit(exit_code)
    for _ in range(5):
        assert_holds_the_cells(source)
    assert os.waitpid(child, 0)[1] == 0


def test_a_closed_store_is_reopened(tmp_path: Path) -> None:
    the_cells().write_h5ad(tmp_path / "cells.h5ad")
    store = Store(tmp_path / "cells.h5ad")
    store.close()
    the_cells().write_h5ad(tmp_path / "cells.h5ad")  # HDF5 would refuse this for an open file
    assert "X" in store


LAYOUTS: dict[str, Callable[[sparse.csr_matrix], object]] = {
    "CSR": lambda matrix: matrix,
    "CSC": lambda matrix: matrix.tocsc(),
    "dense": lambda matrix: matrix.toarray(),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("place", ["X", "raw"])
@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_counts_are_the_same_read_in_blocks_or_at_once(
    tmp_path: Path, layout: str, place: str, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    adata = the_cells()
    counts = adata.X.toarray()
    adata.X = LAYOUTS[layout](adata.X)
    if place == "raw":
        adata.raw = adata.copy()
        adata.X = LAYOUTS[layout](sparse.csr_matrix(np.log1p(counts)))
    getattr(adata, f"write_{ending}")(tmp_path / f"cells.{ending}")
    for read_in_blocks in (True, False):
        caplog.clear()
        source = open_source(tmp_path / f"cells.{ending}", read_in_blocks=read_in_blocks)
        for start, stop in BLOCKS:
            np.testing.assert_array_equal(source.counts(start, stop).toarray(), counts[start:stop])
        has_warned = "counts are stored by column (CSC); loading the whole matrix" in caplog.text
        assert has_warned == (layout == "CSC")


def replace(group: Any, name: str, values: np.ndarray) -> None:
    del group[name]
    if isinstance(group, zarr.Group):
        group.create_array(name, data=values)
    else:
        group[name] = values


def read_in_steps(path: Path, read_in_blocks: bool) -> None:
    source = open_source(path, read_in_blocks=read_in_blocks)
    for start in range(0, N_CELLS, 3):
        source.counts(start, start + 3)


@pytest.mark.parametrize(("ending", "read_in_blocks"), [("h5ad", True), ("h5ad", False), ("zarr", True)])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("data", lambda values: values[:-1]),
        ("data", lambda values: np.append(values, values[:5])),
        ("indices", lambda values: values[:-2]),
        ("indices", lambda values: np.append(values[:-1], N_GENES)),
        ("indices", lambda values: np.append(values[:-1], -1)),
        ("indptr", lambda values: values[:-1]),
        ("indptr", lambda values: np.append(values, values[-1])),
        ("indptr", lambda values: np.r_[values[:10], values[12], values[11], values[12:]]),
        ("indptr", lambda values: np.r_[values[:-2], values[-1] + 9, values[-1]]),
        ("indptr", lambda values: np.r_[3, values[1:]]),
    ],
    ids=[
        *("data short", "data long", "indices short", "index too large", "index negative", "indptr short"),
        *("indptr long", "indptr decreases", "indptr beyond the data", "indptr does not begin at 0"),
    ],
)
def test_a_damaged_matrix_is_an_error(
    tmp_path: Path, name: str, damage: Callable[[np.ndarray], np.ndarray], ending: str, read_in_blocks: bool
) -> None:
    path = tmp_path / f"cells.{ending}"
    getattr(the_cells(), f"write_{ending}")(path)
    root: Any = zarr.open_group(str(path), use_consolidated=False) if ending == "zarr" else h5py.File(path, "r+")
    replace(root["X"], name, damage(root["X"][name][:]))
    if isinstance(root, zarr.Group):
        zarr.consolidate_metadata(root.store)
    else:
        root.close()
    with pytest.raises(DataError, match=rf"cells\.{ending}: .*damaged"):
        read_in_steps(path, read_in_blocks)


def test_a_metadata_column_of_the_wrong_length_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    the_cells().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        attributes = dict(file["obs/donor/codes"].attrs)
        replace(file["obs/donor"], "codes", np.zeros(7, np.int8))
        file["obs/donor/codes"].attrs.update(attributes)
    source = open_source(path)
    assert source.obs.rows(0, 1, ["assay"]).columns == ["assay"]  # other columns can be read
    with pytest.raises(DataError, match=r"damaged: obs has 30 rows, but its column 'donor' has 7"):
        source.obs.rows(0, 1)


def test_missing_locations_are_usage_errors(places: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for location in (
        f"{places['http']}/nothing.zarr",
        f"{places['s3']}/nothing.zarr",
        "s3://no-such-bucket/cells.zarr",
        "http://127.0.0.1:1/cells.zarr",
    ):
        with pytest.raises(UsageError, match=f"--data-file {location}: cannot be read as a zarr store"):
            open_source(location)
    with pytest.raises(UsageError, match=r"nothing\.zarr: no such file or folder"):
        open_source(tmp_path / "nothing.zarr")
    with pytest.raises(UsageError, match="is a folder, but not a zarr store"):
        open_source(tmp_path / "folder")


def test_other_zarr_stores_are_an_error(tmp_path: Path) -> None:
    zarr.open_group(str(tmp_path / "other.zarr"), mode="w").create_array("matrix", data=np.ones(3))
    with pytest.raises(DataError, match=r"other\.zarr: not an AnnData"):
        open_source(tmp_path / "other.zarr")
