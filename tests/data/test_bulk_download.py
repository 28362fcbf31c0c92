"""Datasets of CELLxGENE Discover are downloaded completely and verified, despite faults."""

import glob
import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from tests.commands import COMMAND, finish, start
from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import random_adata
from tests.web import Fault, Web, serve
from transcriptformer.cli.main import app
from transcriptformer.data.bulk_download import API_VARIABLE, Selection, inspect_h5ad, select_datasets
from transcriptformer.errors import DownloadError
from transcriptformer.fetching import fetcher
from transcriptformer.fetching.fetcher import DamagedFileError, RefusedFileError

LIST = "/curation/v1/datasets"


def dataset(name: str, species: str = "Homo sapiens", web: Web | None = None, **more: Any) -> dict[str, Any]:
    """API metadata of a dataset whose file is served under its name."""
    address, path = (web.address, f"/{name}.h5ad") if web else ("", "")
    size = len(web.files[path]) if web else 1
    assets = [
        {"filetype": "RDS", "url": f"{address}/{name}.rds", "filesize": 7},
        {"filetype": "H5AD", "url": address + path, "filesize": size},
    ]
    return {
        "dataset_id": name,
        "collection_id": "c1",
        "collection_doi": "10.1/x",
        "organism": [{"label": species}],
        "is_primary_data": [True],
        "assets": assets,
        "cell_count": 20,
        "tissue": [{"label": "lung"}],
        "assay": [{"label": "10x 3' v3"}],
        "disease": [{"label": "normal"}],
        **more,
    }


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Contents of several different h5ad files."""
    folder = tmp_path_factory.mktemp("h5ad")
    for i in range(6):
        random_adata(20 + i, seed=i).write_h5ad(folder / f"{i}.h5ad")
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.fixture
def web(contents: list[bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """Serves four datasets, three of them human."""
    monkeypatch.setattr(fetcher, "INITIAL_BACKOFF", 0.001)
    with serve(Web({f"/d{i}.h5ad": content for i, content in enumerate(contents[:4])})) as web:
        monkeypatch.setenv(API_VARIABLE, web.address)
        announce(web, *(dataset(f"d{i}", web=web) for i in range(3)), dataset("d3", "Mus musculus", web))
        yield web


def announce(web: Web, *datasets: dict[str, Any]) -> None:
    web.files[LIST] = json.dumps(datasets).encode()


def download(folder: Path, *options: object, species: str = "homo sapiens") -> Result:
    fixed = ["download-data", "--species", species, "--output-dir", folder, "--max-retries", 3]
    return CliRunner().invoke(app, [str(part) for part in (*fixed, *options)])


def assert_whole(folder: Path, web: Web, *names: str) -> None:
    """The folder contains exactly these datasets, byte for byte, with their records."""
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(names)
    for name in names:
        assert sorted(path.name for path in (folder / name).iterdir()) == ["__success__", "full.h5ad"]
        assert (folder / name / "full.h5ad").read_bytes() == web.files[f"/{name}.h5ad"]
        record = json.loads((folder / name / "__success__").read_text())
        assert record["size"] == len(web.files[f"/{name}.h5ad"])
        assert record["url"] == f"{web.address}/{name}.h5ad"
        with h5py.File(folder / name / "full.h5ad") as file:
            assert [record["cells"], record["genes"]] == list(file["X"].attrs["shape"])


def test_datasets_are_downloaded_with_records_and_metadata(web: Web, tmp_path: Path) -> None:
    result = download(tmp_path)
    assert result.exit_code == 0, result.output
    assert_whole(tmp_path, web, "d0", "d1", "d2")
    metadata = json.loads((tmp_path / "dataset_metadata.json").read_text())
    assert metadata == json.loads(web.files[LIST])[:3]
    assert "3 datasets with 60 cells" in result.stdout
    assert "downloaded" in result.stdout


def cellxgene_like(path: Path, seed: int) -> bytes:
    """A file as CELLxGENE publishes it: ids in the index, log-normalized X, counts in raw, text as categories."""
    adata = random_adata(20, seed=seed)
    ids, names = adata.var["ensembl_id"].astype(str).to_numpy(), [f"SYMBOL{i}" for i in range(adata.n_vars)]
    adata.var = pd.DataFrame({"feature_is_filtered": False, "feature_name": pd.Categorical(names)}, index=ids)
    adata.raw = adata.copy()
    adata.X = adata.X.log1p() * 0.7
    adata.obs = adata.obs.assign(assay="10x 3' v3", assay_ontology_term_id="EFO:0009922", cell_type="T cell")
    adata.obs_names = [f"{seed}-{name}" for name in adata.obs_names]
    adata.strings_to_categoricals()
    adata.write_h5ad(path)
    return path.read_bytes()


@pytest.mark.parametrize("quoted", [False, True])
def test_downloaded_files_need_no_option_for_inference(quoted: bool, web: Web, tmp_path: Path) -> None:
    web.files.update({f"/d{i}.h5ad": cellxgene_like(tmp_path / "cells.h5ad", i) for i in range(2)})
    announce(web, *(dataset(f"d{i}", web=web) for i in range(2)))
    assert download(tmp_path / "cellxgene").exit_code == 0
    pattern = str(tmp_path / "cellxgene" / "*" / "full.h5ad")
    files = [pattern] if quoted else sorted(glob.glob(pattern))  # noqa: PTH207  (as a shell expands it)
    command = ["inference", "--checkpoint-path", str(CHECKPOINT), "--output-path", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--data-file", *files])
    assert done.exit_code == 0, done.output
    assert "counts from .raw.X; gene ids from the index of var (2 inputs)" in done.stderr
    assert anndata.read_h5ad(tmp_path / "out" / "embeddings.h5ad").obsm["embeddings"].shape[0] == 40


def test_second_run_downloads_nothing_and_another_species_is_added(web: Web, tmp_path: Path) -> None:
    download(tmp_path)
    web.requests.clear()
    result = download(tmp_path)
    assert result.exit_code == 0
    assert [path for path, _, _ in web.requests] == [LIST]
    assert download(tmp_path, species="mus musculus").exit_code == 0
    assert_whole(tmp_path, web, "d0", "d1", "d2", "d3")
    assert len(json.loads((tmp_path / "dataset_metadata.json").read_text())) == 4


def test_no_metadata_writes_none(web: Web, tmp_path: Path) -> None:
    assert download(tmp_path, "--no-metadata").exit_code == 0
    assert not (tmp_path / "dataset_metadata.json").exists()


def test_dry_run_only_counts(web: Web, tmp_path: Path) -> None:
    result = download(tmp_path / "new", "--dry-run")
    assert (
        result.stdout
        == f"3 datasets with 60 cells, {sum(len(web.files[f'/d{i}.h5ad']) for i in range(3)) / 1e6:.1f} MB\n"
    )
    assert not (tmp_path / "new").exists()
    assert [path for path, _, _ in web.requests] == [LIST]


def test_test_only_sends_one_request(web: Web, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["download-data", "--test-only", "--output-dir", str(tmp_path / "new")])
    assert result.stdout == f"{web.address} answers: 4 datasets\n"
    assert not (tmp_path / "new").exists()


def test_module_is_the_same_command(web: Web, tmp_path: Path) -> None:
    options = ["--species", "homo sapiens", "--output-dir", str(tmp_path)]
    module = [sys.executable, "-m", "transcriptformer.data.bulk_download", *options]
    result = subprocess.run(module, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert_whole(tmp_path, web, "d0", "d1", "d2")


def test_failed_dataset_is_named_and_does_not_stop_the_others(web: Web, tmp_path: Path) -> None:
    web.fault = lambda path, n: "404" if path == "/d1.h5ad" else ""
    result = download(tmp_path)
    assert result.exit_code == 1
    assert f"failed: d1: {web.address}/d1.h5ad: HTTP 404" in result.stdout
    assert_whole(tmp_path, web, "d0", "d2")
    assert [entry["dataset_id"] for entry in json.loads((tmp_path / "dataset_metadata.json").read_text())] == [
        "d0",
        "d2",
    ]
    web.fault = lambda path, n: ""
    assert download(tmp_path).exit_code == 0
    assert_whole(tmp_path, web, "d0", "d1", "d2")


def test_dataset_without_h5ad_is_named(web: Web, tmp_path: Path) -> None:
    announce(web, dataset("d0", web=web), dataset("d1", assets=[{"filetype": "RDS", "url": "x", "filesize": 1}]))
    result = download(tmp_path)
    assert result.exit_code == 1
    assert "failed: d1: d1: the dataset has no H5AD file" in result.stdout
    assert_whole(tmp_path, web, "d0")


@pytest.mark.parametrize("cut", [0, 100, 20_000])
def test_incomplete_h5ad_is_refused(cut: int, web: Web, tmp_path: Path) -> None:
    web.files["/d0.h5ad"] = web.files["/d0.h5ad"][:cut]
    announce(web, dataset("d0", web=web))
    result = download(tmp_path)
    assert result.exit_code == 1
    assert "not a complete h5ad" in result.stdout
    assert not list(tmp_path.rglob("full.h5ad*"))
    assert not list(tmp_path.rglob("__success__"))


def test_new_version_replaces_the_old_one_when_complete(web: Web, tmp_path: Path, contents: list[bytes]) -> None:
    download(tmp_path)
    old = web.files["/d0.h5ad"]
    for new, fault in [(contents[5], "500"), (contents[5][:20_000], "")]:  # a failure, and a damaged file
        web.files["/d0.h5ad"] = new
        announce(web, dataset("d0", web=web))
        web.fault = lambda path, n, fault=fault: fault if path == "/d0.h5ad" else ""  # type: ignore[misc]
        assert download(tmp_path).exit_code == 1
        assert (tmp_path / "d0" / "full.h5ad").read_bytes() == old
        assert (tmp_path / "d0" / "__success__").exists()
    web.files["/d0.h5ad"] = contents[5]
    announce(web, dataset("d0", web=web))
    assert download(tmp_path).exit_code == 0
    assert_whole(tmp_path, web, "d0", "d1", "d2")


@pytest.mark.parametrize("record", [None, "", "{}"])
def test_complete_file_without_a_record_is_verified_not_downloaded(
    record: str | None, web: Web, tmp_path: Path
) -> None:
    """As after a kill just before the end, or a download by the published package."""
    download(tmp_path)
    (tmp_path / "d0" / "__success__").unlink()
    if record is not None:
        (tmp_path / "d0" / "__success__").write_text(record)
    web.requests.clear()
    assert download(tmp_path).exit_code == 0
    assert [path for path, _, _ in web.requests] == [LIST]
    assert_whole(tmp_path, web, "d0", "d1", "d2")


def test_damaged_file_without_a_record_is_downloaded_again(web: Web, tmp_path: Path) -> None:
    download(tmp_path)
    (tmp_path / "d0" / "__success__").unlink()
    (tmp_path / "d0" / "full.h5ad").write_bytes(bytes(len(web.files["/d0.h5ad"])))
    assert download(tmp_path).exit_code == 0
    assert_whole(tmp_path, web, "d0", "d1", "d2")


def names(datasets: list[dict[str, Any]]) -> list[str]:
    return [entry["dataset_id"] for entry in datasets]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, ["plain", "liver", "smart", "flu", "elsewhere"]),
        ({"tissue": ("LIVER", "brain")}, ["liver"]),
        ({"assay": ("smart-seq2",)}, ["smart"]),
        ({"disease": ("influenza",)}, ["flu"]),
        ({"tissue": ("lung",), "disease": ("influenza",)}, ["flu"]),
        ({"collection": ("c2",)}, ["elsewhere"]),
        ({"collection": ("https://cellxgene.cziscience.com/collections/c2/",)}, ["elsewhere"]),
        ({"collection": ("https://doi.org/10.1/x",), "max_datasets": 1}, ["plain"]),
        ({"collection": ("10.1/X",), "max_datasets": 2}, ["plain", "liver"]),
    ],
)
def test_selection(wanted: dict[str, Any], expected: list[str]) -> None:
    datasets = [
        dataset("plain"),
        dataset("secondary", is_primary_data=[False]),
        dataset("mixed", organism=[{"label": "Homo sapiens"}, {"label": "Mus musculus"}]),
        dataset("mouse", "Mus musculus"),
        dataset("liver", tissue=[{"label": "liver"}, {"label": "lung"}]),
        dataset("smart", assay=[{"label": "Smart-seq2"}]),
        dataset("flu", disease=[{"label": "influenza"}]),
        dataset("elsewhere", collection_id="c2", collection_doi=None),
    ]
    assert names(select_datasets(datasets, Selection(("Homo Sapiens",), **wanted))) == expected


def test_unknown_species_lists_the_available_ones() -> None:
    datasets = [
        dataset("a"),
        dataset("b"),
        dataset("c", "Mus musculus"),
        dataset("d", "Danio rerio", is_primary_data=[]),
    ]
    with pytest.raises(
        DownloadError, match=r"'pan trog': no datasets; available species: homo sapiens \(2\), mus musculus \(1\)$"
    ):
        select_datasets(datasets, Selection(("homo sapiens", "pan trog")))


def test_empty_selection_is_an_error() -> None:
    with pytest.raises(DownloadError, match="no dataset matches"):
        select_datasets([dataset("a")], Selection(("homo sapiens",), tissue=("brain",)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--species", " , "], "--species: name at least one"),
        (["--species", "pan paniscus"], "'pan paniscus': no datasets"),
        (["--species", "homo sapiens", "--filter", "x == 1"], "--filter applies only to --source census"),
        (
            ["--species", "homo sapiens", "--source", "census", "--tissue", "lung"],
            "--tissue applies only to",
        ),
        (["--species", "homo sapiens", "--cells-per-file", "9"], "--cells-per-file applies only to --source census"),
    ],
)
def test_invalid_options_are_a_one_line_error(options: list[str], reason: str, web: Web, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["download-data", "--output-dir", str(tmp_path / "new"), *options])
    assert result.exit_code != 0
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "answer",
    [b"<html>Welcome to our Wi-Fi!</html>", b"{}x", b"[1]", b'{"a": 1}', b"[{}]", b"null", b"{}", b"[]", b'""'],
)
def test_invalid_response_is_a_one_line_error(answer: bytes, web: Web, tmp_path: Path) -> None:
    web.files[LIST] = answer
    result = download(tmp_path)
    assert result.exit_code == 1
    assert "the response is not a list of datasets; check for a proxy or a log-in page" in result.stderr


@pytest.mark.parametrize(("status", "requests"), [("403", 1), ("404", 1), ("503", 4)])
def test_http_error_is_a_one_line_error(status: str, requests: int, web: Web, tmp_path: Path) -> None:
    web.fault = lambda path, n: status
    result = download(tmp_path)
    assert result.exit_code == 1
    assert f"ERROR: {web.address}{LIST}: HTTP {status}" in result.stderr
    assert len(web.requests) == requests


def test_missing_network_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_VARIABLE, "http://no-such-host.invalid")
    result = download(tmp_path, "--max-retries", 0)
    assert result.exit_code == 1
    assert result.stderr == f"ERROR: http://no-such-host.invalid{LIST}: host not found, or no network\n"


def test_lack_of_disk_space_is_reported_before_downloading(web: Web, tmp_path: Path) -> None:
    announce(web, dataset("d0", assets=[{"filetype": "H5AD", "url": f"{web.address}/d0.h5ad", "filesize": 2**60}]))
    result = download(tmp_path)
    assert result.exit_code == 1
    assert "free up space and rerun" in result.stderr
    assert not (tmp_path / "d0").exists()


def test_unwritable_folder_is_a_one_line_error(web: Web, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    result = download(tmp_path / "taken")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "..", ".lock", "", "x" * 300, "a\0b"])
def test_id_outside_the_folder_is_refused(name: str, web: Web, tmp_path: Path) -> None:
    announce(web, {**dataset("d0", web=web), "dataset_id": name})
    result = download(tmp_path / "place")
    assert result.exit_code == 1
    assert "is not a valid folder name" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] in (["place"], [])


@pytest.mark.parametrize("counts", ["none", "no cells", "empty"])
def test_file_without_counts_is_refused(counts: str, tmp_path: Path) -> None:
    adata = random_adata(3, density=0 if counts == "empty" else 0.3)
    adata = adata[:0] if counts == "no cells" else adata
    if counts == "none":
        del adata.X
    adata.write_h5ad(tmp_path / "full.h5ad")
    with pytest.raises(DamagedFileError if counts == "none" else RefusedFileError):
        inspect_h5ad(tmp_path / "full.h5ad")


@pytest.mark.parametrize(
    "odd",
    [
        {"assets": [{"filetype": "H5AD"}]},
        {"assets": ["H5AD"]},
        {"assets": "none"},
        {"assets": [{"filetype": "H5AD", "url": "nonsense", "filesize": "large"}]},
    ],
)
def test_malformed_dataset_does_not_stop_the_others(odd: dict[str, Any], web: Web, tmp_path: Path) -> None:
    announce(web, dataset("odd", **odd), dataset("d0", web=web))
    result = download(tmp_path)
    assert result.exit_code == 1
    assert "failed: odd: " in result.stdout
    assert_whole(tmp_path, web, "d0")


def test_datasets_with_malformed_species_are_skipped() -> None:
    odd = [dataset("a", organism="Homo sapiens"), dataset("b", organism=["Homo sapiens"]), dataset("c", organism=None)]
    assert names(select_datasets([*odd, dataset("d")], Selection(("homo sapiens",)))) == ["d"]


def test_duplicate_dataset_is_downloaded_once(web: Web, tmp_path: Path) -> None:
    announce(web, dataset("d0", web=web), dataset("d0", web=web))
    result = download(tmp_path)
    assert "1 datasets with 20 cells" in result.stdout
    assert_whole(tmp_path, web, "d0")


def test_metadata_is_merged_and_not_lost(web: Web, tmp_path: Path, contents: list[bytes]) -> None:
    download(tmp_path)
    before = (tmp_path / "dataset_metadata.json").read_text()
    web.files["/d0.h5ad"] = contents[5][:1000]
    announce(web, dataset("d0", web=web))
    download(tmp_path)
    assert (tmp_path / "dataset_metadata.json").read_text() == before
    (tmp_path / "dataset_metadata.json").write_text("{ notes of mine")
    announce(web, dataset("d3", "Mus musculus", web))
    assert "cannot be read; metadata is not updated" in download(tmp_path, species="mus musculus").stderr
    assert (tmp_path / "dataset_metadata.json").read_text() == "{ notes of mine"


def command(folder: Path, processes: int = 4) -> list[str]:
    fixed = ["download-data", "--species", "homo sapiens", "--max-retries", "20"]
    return [str(part) for part in (COMMAND, *fixed, "--output-dir", folder, "--processes", processes)]


def test_ctrl_c_leaves_a_resumable_download(web: Web, tmp_path: Path) -> None:
    web.fault = lambda path, n: "slow 8" if path == "/d0.h5ad" and n == 0 else ""
    web.files["/d0.h5ad"] += bytes(3_000_000)
    announce(web, dataset("d0", web=web), dataset("d1", web=web))
    process = start(command(tmp_path))
    while not web.sent["/d0.h5ad"] > 100_000:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    result = finish(process, kill_after=30)
    assert result.returncode == 130, result.stderr
    assert "rerun the same command to continue" in result.stderr
    assert (tmp_path / "d0" / "full.h5ad.part").exists()
    assert download(tmp_path).exit_code == 0
    assert_whole(tmp_path, web, "d0", "d1")
    assert web.sent["/d0.h5ad"] < 1.6 * len(web.files["/d0.h5ad"])  # data in flight is lost


def test_full_disk_is_a_one_line_error_and_data_is_kept(web: Web, tmp_path: Path) -> None:
    """As on a disk that fills up meanwhile."""
    web.files["/d0.h5ad"] += bytes(3_000_000)
    announce(web, dataset("d0", web=web), dataset("d1", web=web))
    result = finish(start(["bash", "-c", 'ulimit -f 1000; exec "$@"', "-", *command(tmp_path)]))
    assert result.returncode == 1
    assert "d0/full.h5ad: cannot be written: File too large; files downloaded so far are kept" in result.stdout
    assert sorted(path.name for path in (tmp_path / "d0").iterdir()) == ["full.h5ad.part", "full.h5ad.part.json"]
    assert download(tmp_path).exit_code == 0
    assert_whole(tmp_path, web, "d0", "d1")
    assert web.sent["/d0.h5ad"] < 2 * len(web.files["/d0.h5ad"])


def storm(seed: int, faults: tuple[str, ...] = ("reset", "truncated", "short", "500", "503", "429 0")) -> Fault:
    """Each request fails with probability 0.3, in one way or another."""
    rng, lock = random.Random(seed), threading.Lock()

    def fault(path: str, n: int) -> str:
        with lock:
            return rng.choice(faults) if rng.random() < 0.3 else ""

    return fault


def many_datasets(web: Web, n: int, contents: list[bytes], padding: int) -> list[str]:
    """Datasets whose files differ by trailing bytes, which HDF5 allows."""
    names = [f"s{i:03d}" for i in range(n)]
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        web.files[f"/{name}.h5ad"] = contents[i % len(contents)] + rng.bytes(padding)
    announce(web, *(dataset(name, web=web) for name in names))
    return names


@pytest.mark.parametrize("n", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_everything_is_downloaded_despite_faults_and_little_of_it_twice(
    n: int, web: Web, tmp_path: Path, contents: list[bytes]
) -> None:
    names = many_datasets(web, n, contents, 200_000)
    web.fault = storm(0)
    result = download(tmp_path, "--processes", 8, "--max-retries", 20)
    assert result.exit_code == 0, result.output
    assert_whole(tmp_path, web, *names)
    of_files = {path: n_bytes for path, n_bytes in web.sent.items() if path != LIST}
    assert sum(of_files.values()) < 1.3 * sum(len(web.files[path]) for path in of_files)


@pytest.mark.slow
def test_rerun_after_a_kill_completes_the_download(web: Web, tmp_path: Path, contents: list[bytes]) -> None:
    names = many_datasets(web, 40, contents, 3_000_000)
    web.fault = lambda path, n: "slow" if n % 2 else ""
    rng = np.random.default_rng(0)
    for moment in itertools.chain(rng.uniform(1, 4, 20), [None]):
        verified, asked = {f"/{path.parent.name}.h5ad" for path in tmp_path.glob("*/__success__")}, len(web.requests)
        process = start(command(tmp_path))
        if moment is not None:
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
        result = finish(process)
        assert not {path for path, _, _ in web.requests[asked:]} & verified
        for path in tmp_path.glob("*/__success__"):
            assert (path.parent / "full.h5ad").read_bytes() == web.files[f"/{path.parent.name}.h5ad"]
    assert result.returncode == 0, result.stderr
    assert_whole(tmp_path, web, *names)
