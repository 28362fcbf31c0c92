"""How fast `download-data` is beside `curl`, from a server on loopback: `python -m scripts.download_speed`."""

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
    """Fetch the same files in turn, and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--megabytes", type=int, default=10, help="of each file")
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
            for name, fetch in (("curl", by_curl), ("download-data", by_us)):
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
    """A service with so many datasets, all of the same h5ad, filled up with bytes behind its end."""
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


def by_curl(address: str, folder: Path, n_files: int, workers: int) -> None:
    """All files into a folder."""
    command = ["curl", "--silent", "--fail", "--parallel", "--parallel-max", str(workers)]
    command += ["--remote-name-all", f"{address}/[0-{n_files - 1}].h5ad"]
    subprocess.run(command, cwd=folder, check=True)


def by_us(address: str, folder: Path, n_files: int, workers: int) -> None:
    """The same by our command, which also looks into each file."""
    command = [str(Path(sys.executable).with_name("transcriptformer")), "download-data", "--species", "homo sapiens"]
    command += ["--output-dir", str(folder), "--processes", str(workers)]
    subprocess.run(
        command, check=True, capture_output=True, env={"TRANSCRIPTFORMER_CELLXGENE_API": address, "PATH": "/usr/bin"}
    )


if __name__ == "__main__":
    main()
