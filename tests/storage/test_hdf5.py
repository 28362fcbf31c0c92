"""Failed writes of HDF5 files raise exceptions instead of crashing."""

import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

import transcriptformer as tf
from tests.golden_cases import CHECKPOINT
from transcriptformer.errors import OutputError
from transcriptformer.inference.embeddings import Embeddings
from transcriptformer.runs.output import write_cells
from transcriptformer.runtime.signals import TerminatedError, raise_terminated
from transcriptformer.storage.hdf5 import new_hdf5
from transcriptformer.storage.results import Field, Pieces, PieceWriter, verified_pieces

N_CELLS, WIDTH = 3000, 24


def in_child(work: Callable[[], object]) -> int:
    """Exit code of a child process: 0 if `work` raises OutputError, negative if it is killed."""

    def expect_error() -> None:
        try:
            work()
        except OutputError:
            os._exit(0)
        os._exit(1)

    process = multiprocessing.get_context("fork").Process(target=expect_error)
    process.start()
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Write a result of several blocks, with many columns of obs, to `tmp_path / "out" / "x.h5ad"`."""
    monkeypatch.setattr("transcriptformer.inference.embeddings.BLOCK_BYTES", 2**15)
    monkeypatch.setattr("transcriptformer.data.row_stream.CHUNK_BYTES", 2**12)
    layout = {"embeddings": Field("float32", WIDTH), "llh": Field("float32")}
    writer = PieceWriter(tmp_path, 0, layout, "run")
    rng = np.random.default_rng(0)
    embeddings, llh = rng.standard_normal((N_CELLS, WIDTH)), rng.standard_normal(N_CELLS)
    writer.add({"rows": np.arange(N_CELLS), "embeddings": embeddings, "llh": llh})
    writer.flush()
    obs = pd.DataFrame({f"column {i}": rng.integers(0, 9, N_CELLS) for i in range(30)})
    obs["type"] = pd.Categorical(rng.choice(["a", "b"], N_CELLS))
    obs.index = obs.index.astype(str)
    (tmp_path / "out").mkdir()
    task = Embeddings(tf.load(CHECKPOINT, device="cpu"))
    task.layout = layout

    def write_result() -> None:
        blocks = [obs.iloc[start : start + 500] for start in range(0, N_CELLS, 500)]
        results = Pieces(verified_pieces(tmp_path, "run"), layout)
        write_cells(tmp_path / "out" / "x.h5ad", N_CELLS, lambda: iter(blocks), task, results, {"made": "here"})

    return write_result


@pytest.mark.parametrize("n_limits", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_full_disk_is_an_error_at_any_write(n_limits: int, write: Callable[[], None], tmp_path: Path) -> None:
    output = tmp_path / "out" / "x.h5ad"
    write()
    size = output.stat().st_size
    output.unlink()
    for limit in np.linspace(0, size - 1, n_limits).astype(int).tolist():

        def write_with_limit(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            write()

        assert in_child(write_with_limit) == 0, f"limit {limit}"
        assert list(output.parent.iterdir()) == [], f"limit {limit}"


def test_freed_space_does_not_hide_an_earlier_failure(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"

    def write_with_limit_for_a_while() -> None:
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        with new_hdf5(path) as file:
            for i in range(200):
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**16 if 50 < i < 60 else most, most))
                file[f"group {i % 7}/array {i}"] = np.full(1000, i)
                file.flush()
            for i in range(200):
                assert file[f"group {i % 7}/array {i}"][5] == i

    with pytest.raises(OSError, match="File too large"):
        write_with_limit_for_a_while()


def test_written_file_is_ordinary_hdf5(tmp_path: Path) -> None:
    with new_hdf5(tmp_path / "x.h5") as file:
        for i in range(500):
            file[f"{i % 7}/{i}"] = np.full(1000, i)
    with h5py.File(tmp_path / "x.h5") as file:
        assert all((file[f"{i % 7}/{i}"][:] == i).all() for i in range(500))


def test_ctrl_c_stops_writing(tmp_path: Path) -> None:
    def write_and_interrupt() -> None:
        with new_hdf5(tmp_path / "x.h5") as file:
            for i in range(10_000):
                if i == 300:
                    signal.raise_signal(signal.SIGINT)
                file[str(i)] = np.full(100, i)

    with pytest.raises(KeyboardInterrupt):
        write_and_interrupt()


def test_signal_while_writing_raises_without_a_crash(write: Callable[[], None], tmp_path: Path) -> None:
    """At any moment; HDF5 crashes on exceptions in the file object that it writes to."""

    def write_with_timer(seconds: float) -> int:
        def work() -> None:
            signal.signal(signal.SIGTERM, raise_terminated)
            try:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()
                for _ in range(20):
                    write()
            except TerminatedError:
                os._exit(0)

        return in_child(work)  # which raises TerminatedError

    for moment in np.linspace(0.002, 0.05, 15).tolist():
        assert write_with_timer(moment) == 0, moment
        assert not list((tmp_path / "out").glob(".*")), moment
