"""Compare the speed of `download-data` with `curl` on a loopback server: `python -m scripts.download_speed`."""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import anndata
import numpy as np
from scipy import sparse
from tests.web import Web, serve


def main() -> None:
    """Alternate both commands on the same files and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--megabytes", type=int, default=10, help="size of each file")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(
        target=serve_files, args=(theirs, arguments.files, arguments.megabytes), daemon=True
    )
    server.start()
    address = ours.recv()
    seconds: dict[str, list[float]] = {"curl": [], "download-data": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(arguments.repeats):
            for name, fetch in (("curl", fetch_with_curl), ("download-data", fetch_with_download_data)):
                into = Path(folder) / f"{name}{i}"
                into.mkdir()
                started = time.perf_counter()
                fetch(address, into, arguments.files, arguments.workers)
                seconds[name].append(time.perf_counter() - started)
                subprocess.run(["rm", "-r", str(into)], check=True)
    n_bytes = arguments.files * arguments.megabytes * 1e6
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:14} {median:.2f} s ({min(values):.2f} to {max(values):.2f}), {n_bytes / median / 1e6:,.0f} MB/s")
    print(
        f"share of curl's rate: {statistics.median(seconds['curl']) / statistics.median(seconds['download-data']):.2f}"
    )


def serve_files(pipe: Connection, n_files: int, megabytes: int) -> None:
    """Serve a catalog of `n_files` datasets, copies of one h5ad padded to `megabytes`; send the address to `pipe`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        counts = sparse.random(1000, 2000, 0.1, "csr", np.float32, np.random.default_rng(0))
        anndata.AnnData(counts).write_h5ad(path)
        content = path.read_bytes()
    content += bytes(megabytes * 10**6 - len(content))
    with serve(Web({f"/{i}.h5ad": content for i in range(n_files)})) as web:
        datasets = [
            {
                "dataset_id": str(i),
                "organism": [{"label": "Homo sapiens"}],
                "is_primary_data": [True],
                "assets": [{"filetype": "H5AD", "url": f"{web.address}/{i}.h5ad", "filesize": len(content)}],
            }
            for i in range(n_files)
        ]
        web.files["/curation/v1/datasets"] = json.dumps(datasets).encode()
        pipe.send(web.address)
        time.sleep(3600)


def fetch_with_curl(address: str, folder: Path, n_files: int, workers: int) -> None:
    """Fetch all files into a folder with curl."""
    command = ["curl", "--silent", "--fail", "--parallel", "--parallel-max", str(workers)]
    command += ["--remote-name-all", f"{address}/[0-{n_files - 1}].h5ad"]
    subprocess.run(command, cwd=folder, check=True)


def fetch_with_download_data(address: str, folder: Path, n_files: int, workers: int) -> None:
    """Fetch all files with `download-data`, which also validates them."""
    command = [str(Path(sys.executable).with_name("transcriptformer")), "download-data", "--species", "homo sapiens"]
    command += ["--output-dir", str(folder), "--processes", str(workers)]
    subprocess.run(
        command, check=True, capture_output=True, env={"TRANSCRIPTFORMER_CELLXGENE_API": address, "PATH": "/usr/bin"}
    )


if __name__ == "__main__":
    main()
