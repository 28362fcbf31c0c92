"""Inputs that refer to other files."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext, suppress
from pathlib import Path

import anndata
import h5py
import numpy as np
import psutil
import pytest

from tests.golden_cases import CHECKPOINT, TOLERANCE, relative_error
from tests.h5ad_files import random_adata
from transcriptformer.api import embed, load
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.checkpoint.vocabs import read_gene_ids, read_protein_embeddings
from transcriptformer.config import DataConfig
from transcriptformer.data.fingerprint import FULL_HASH_BYTES, fingerprint
from transcriptformer.data.source import CellSource, open_source
from transcriptformer.errors import CheckpointError, DataError, TranscriptFormerError, UsageError
from transcriptformer.runtime.isolated import CrashedError, run_isolated
from transcriptformer.storage.external import OPTION, Guard

N_CELLS = 24
SECRET = b"root:x:0:0:root:/root:/bin/bash\n" * 8


forks: list[None] = []
os.register_at_fork(before=lambda: forks.append(None))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with a complete cells.h5ad, a copy of it (other.h5ad) and a private file."""
    random_adata(N_CELLS).write_h5ad(tmp_path / "cells.h5ad")
    shutil.copy(tmp_path / "cells.h5ad", tmp_path / "other.h5ad")
    (tmp_path / "secret").write_bytes(SECRET)
    return tmp_path


def raw_data_elsewhere(file: h5py.File, folder: Path) -> str:
    column = file["obs"].create_dataset("leak", (N_CELLS,), "u1", external=[(str(folder / "secret"), 0, N_CELLS)])
    column.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    file["obs"].attrs["column-order"] = ["assay", "leak"]
    return "obs/leak"


def counts_elsewhere(file: h5py.File, folder: Path) -> str:
    (folder / "counts").write_bytes(file["X/data"][:].tobytes())
    shape, dtype = file["X/data"].shape, file["X/data"].dtype
    del file["X/data"]
    file["X"].create_dataset("data", shape, dtype, external=[(str(folder / "counts"), 0, h5py.h5f.UNLIMITED)])
    return "X/data"


def link_to(name: str) -> Callable[[h5py.File, Path], str]:
    def replace(file: h5py.File, folder: Path) -> str:
        del file[name]
        file[name] = h5py.ExternalLink("other.h5ad", f"/{name}")
        return name

    return replace


def soft_link_over_a_link(file: h5py.File, folder: Path) -> str:
    del file["X/data"]
    file["elsewhere"] = h5py.ExternalLink("other.h5ad", "/")
    file["X/data"] = h5py.SoftLink("/elsewhere/X/data")
    return "elsewhere"


def virtual(file: h5py.File, folder: Path) -> str:
    shape, dtype = file["X/data"].shape, file["X/data"].dtype
    del file["X/data"]
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource("other.h5ad", "X/data", shape)
    file["X"].create_virtual_dataset("data", layout)
    return "X/data"


def categories_of_an_old_column(file: h5py.File, folder: Path) -> str:
    """As written by anndata 0.7.0: an attribute refers to a dataset that may be unreachable otherwise."""
    del file["obs/assay"]
    hidden = file.create_dataset("hidden", (N_CELLS,), "S1", external=[(str(folder / "secret"), 0, N_CELLS)])
    file["obs/assay"] = np.arange(N_CELLS, dtype=np.int8)
    file["obs/assay"].attrs["categories"] = hidden.ref
    del file["hidden"]
    file["hidden"] = hidden
    file["obs"].create_group("__categories")
    return "obs/assay@categories"


ELSEWHERE = {
    "raw data": raw_data_elsewhere,
    "counts": counts_elsewhere,
    "X": link_to("X"),
    "obs": link_to("obs"),
    "var": link_to("var"),
    "a column": link_to("obs/assay"),
    "over a soft link": soft_link_over_a_link,
    "virtual": virtual,
    "categories": categories_of_an_old_column,
}


def rewrite(folder: Path, edit: Callable[[h5py.File, Path], str]) -> str:
    with h5py.File(folder / "cells.h5ad", "r+") as file:
        return edit(file, folder)


def read_all(folder: Path, allow_external_links: bool = False) -> CellSource:
    source = open_source(folder / "cells.h5ad", DataConfig(allow_external_links=allow_external_links))
    source.obs.rows(0, N_CELLS)
    source.counts(0, N_CELLS)
    return source


@pytest.mark.parametrize("edit", ELSEWHERE.values(), ids=ELSEWHERE)
def test_data_in_another_file_is_refused(folder: Path, edit: Callable[[h5py.File, Path], str]) -> None:
    place = rewrite(folder, edit)
    with pytest.raises(DataError) as refusal:
        read_all(folder)
    assert place in str(refusal.value)
    assert "another file" in str(refusal.value)
    assert OPTION in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", [kind for kind in ELSEWHERE if kind not in ("raw data", "categories")])
def test_data_in_another_file_can_be_allowed(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(folder, ELSEWHERE[kind])
    expected = open_source(folder / "other.h5ad").counts(0, N_CELLS).toarray()
    np.testing.assert_array_equal(read_all(folder, True).counts(0, N_CELLS).toarray(), expected)


def test_raw_data_of_another_file_can_be_allowed(folder: Path) -> None:
    rewrite(folder, raw_data_elsewhere)
    column = read_all(folder, True).obs.rows(0, N_CELLS)["leak"]
    assert bytes(column.tolist()) == SECRET[:N_CELLS]


def shorten(folder: Path) -> None:
    random_adata(2).write_h5ad(folder / "other.h5ad")
    (folder / "counts").write_bytes(b"1234")


def remove(folder: Path) -> None:
    (folder / "other.h5ad").unlink()
    (folder / "counts").unlink(missing_ok=True)


@pytest.mark.parametrize("lose", [remove, shorten])
@pytest.mark.parametrize("edit", [virtual, counts_elsewhere])
def test_missing_external_data_is_an_error(
    folder: Path, edit: Callable[[h5py.File, Path], str], lose: Callable[[Path], None]
) -> None:
    rewrite(folder, edit)
    (folder / "counts").touch()
    lose(folder)
    with pytest.raises(DataError, match=r"X/data is in another file, .*, which is missing or too short"):
        read_all(folder, True)


def made_of(*parts: slice) -> Callable[[h5py.File, Path], str]:
    def replace(file: h5py.File, folder: Path) -> str:
        shape, dtype = file["X/data"].shape, file["X/data"].dtype
        file["kept"] = file["X/data"]
        del file["X/data"]
        layout = h5py.VirtualLayout(shape, dtype)
        for part in parts:
            layout[part] = h5py.VirtualSource(".", "kept", shape)[part]
        file["X"].create_virtual_dataset("data", layout)
        return "X/data"

    return replace


@pytest.mark.parametrize(
    "parts", [[slice(100)], [slice(2, None)] * 2, [slice(0, None, 2)] * 2], ids=["half", "most twice", "every other"]
)
def test_virtual_dataset_must_be_complete(folder: Path, parts: list[slice]) -> None:
    rewrite(folder, made_of(*parts))
    with pytest.raises(DataError, match="X/data is a virtual dataset with missing sources"):
        read_all(folder, True)


@pytest.mark.parametrize(
    "parts", [[slice(200), slice(100, None)], [slice(0, None, 2), slice(1, None, 2)]], ids=["overlap", "interleaved"]
)
def test_virtual_dataset_mappings_may_be_in_any_order(folder: Path, parts: list[slice]) -> None:
    expected = read_all(folder).counts(0, N_CELLS)
    rewrite(folder, made_of(*parts))
    found = read_all(folder, True).counts(0, N_CELLS)
    assert (found != expected).nnz == 0


@pytest.mark.parametrize(("second", "is_whole"), [([1, 4], True), ([1, 3], False)])
def test_virtual_dataset_mappings_may_have_any_shape(tmp_path: Path, second: list[int], is_whole: bool) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    for places in ([0, 2, 3], second):
        space = h5py.h5s.create_simple((5,))
        space.select_none()
        for place in places:
            space.select_hyperslab((place,), (1,), op=h5py.h5s.SELECT_OR)
        properties.set_virtual(space, b".", b"kept", h5py.h5s.create_simple((len(places),)))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["kept"] = np.arange(3.0)
        h5py.h5d.create(file.id, b"X", h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((5,)), dcpl=properties)
        refused = pytest.raises(DataError, match="X is a virtual dataset with missing sources")
        with nullcontext() if is_whole else refused:
            Guard("x.h5", allow_external=False).check(file["X"], "X")


def test_virtual_dataset_of_itself_terminates(folder: Path) -> None:
    def itself(file: h5py.File, folder: Path) -> str:
        shape, dtype = file["X/data"].shape, file["X/data"].dtype
        del file["X/data"]
        layout = h5py.VirtualLayout(shape, dtype)
        layout[:] = h5py.VirtualSource(".", "X/data", shape)
        file["X"].create_virtual_dataset("data", layout)
        return "X/data"

    rewrite(folder, itself)
    with pytest.raises(DataError, match=r"cells\.h5ad: "):
        read_all(folder, True)


@pytest.mark.parametrize("target", ["/nowhere", "/obs/assay", "assay"], ids=["dangling", "circle", "itself"])
def test_broken_link_is_an_error(folder: Path, target: str) -> None:
    def replace(file: h5py.File, folder: Path) -> str:
        del file["obs/assay"]
        file["obs/assay"] = h5py.SoftLink(target)
        return "obs/assay"

    rewrite(folder, replace)
    with pytest.raises(DataError, match=r"cells\.h5ad: damaged: /obs/assay cannot be opened"):
        read_all(folder)


def test_links_within_the_file_are_followed(folder: Path) -> None:
    with h5py.File(folder / "cells.h5ad", "r+") as file:
        file.move("X", "counts")
        file["X"] = h5py.SoftLink("/alias")
        file["alias"] = h5py.SoftLink("counts")
        file["obs/assay"].parent["again"] = file["obs"]  # a cycle of hard links
    expected = open_source(folder / "other.h5ad").counts(0, N_CELLS).toarray()
    np.testing.assert_array_equal(read_all(folder).counts(0, N_CELLS).toarray(), expected)


def test_unread_data_may_be_external(folder: Path) -> None:
    with h5py.File(folder / "cells.h5ad", "r+") as file:
        file["uns/elsewhere"] = h5py.ExternalLink("nowhere.h5ad", "/")
    read_all(folder)


@pytest.mark.filterwarnings("ignore:.*legacy|.*old")
def test_old_layouts_are_read(folder: Path) -> None:
    with h5py.File(folder / "cells.h5ad", "r+") as file:
        names = np.array([(f"c{i}",) for i in range(N_CELLS)], dtype=[("index", "S8")])
        del file["obs"]
        file["obs"] = names
        file["uns/elsewhere"] = h5py.ExternalLink("other.h5ad", "/")
    with pytest.raises(DataError, match=rf"uns/elsewhere is an external link .*{OPTION[:10]}"):
        read_all(folder)


def test_counts_of_a_backed_anndata_count_as_read(folder: Path) -> None:
    rewrite(folder, virtual)
    options = {"model.data_config.allow_external_links": True}
    adata = anndata.read_h5ad(folder / "cells.h5ad", backed="r")
    with pytest.raises(DataError, match=r"the AnnData: X/data is a virtual dataset .*--allow-external-links"):
        embed(adata, load(CHECKPOINT, device="cpu", precision="32"))
    embed(adata, load(CHECKPOINT, device="cpu", precision="32", settings=options))
    adata.file.close()
    embeddings = adata.obsm["X_transcriptformer"]
    expected = embed(folder / "other.h5ad", load(CHECKPOINT, device="cpu", precision="32"))
    assert expected is not None
    assert relative_error(embeddings, expected.obsm["X_transcriptformer"]) < TOLERANCE


@pytest.mark.filterwarnings("ignore:.*zarr:UserWarning", "ignore:Consolidated metadata")
@pytest.mark.parametrize(
    ("target", "message"),
    [("../secret", "a link out of the store, to .*/secret'.*--allow"), ("nowhere", "which is missing")],
)
def test_zarr_links_out_of_the_store_are_refused(folder: Path, target: str, message: str) -> None:
    random_adata(3).write_zarr(folder / "cells.zarr")
    open_source(folder / "cells.zarr")
    (folder / "renamed.zarr").symlink_to("cells.zarr")  # the user's own link
    open_source(folder / "renamed.zarr")
    (folder / "cells.zarr" / "obs" / "chunk").symlink_to(Path("..") / target)
    with pytest.raises(DataError, match=f"obs/chunk is {message}|obs/chunk is .*{message}"):
        open_source(folder / "cells.zarr")


@pytest.mark.filterwarnings("ignore:.*zarr:UserWarning", "ignore:Consolidated metadata")
def test_zarr_links_can_be_allowed(folder: Path) -> None:
    random_adata(N_CELLS).write_zarr(folder / "cells.zarr")
    shutil.move(folder / "cells.zarr" / "obs", folder / "obs")
    (folder / "cells.zarr" / "obs").symlink_to("../obs")
    with pytest.raises(DataError, match="obs is a link out of the store"):
        open_source(folder / "cells.zarr")
    assert len(open_source(folder / "cells.zarr", DataConfig(allow_external_links=True))) == N_CELLS
    (folder / "obs" / "itself").symlink_to("../obs")
    open_source(folder / "cells.zarr", DataConfig(allow_external_links=True))
    (folder / "obs" / "chunk").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"obs/chunk is a link to .*nowhere', which is missing"):
        open_source(folder / "cells.zarr", DataConfig(allow_external_links=True))


@pytest.mark.parametrize("url", ["reference://", "simplecache::s3://bucket/cells.zarr", "reference::file:///x.json"])
def test_redirects_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"refers to other files; .*--allow-external-links"):
        open_source(url)


@pytest.mark.parametrize(
    ("name", "read"), [("keys", read_gene_ids), ("arrays", lambda path: read_protein_embeddings([path]))]
)
def test_protein_embeddings_of_another_file_are_refused(
    tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    shutil.copy(CHECKPOINT / "vocabs" / "homo_sapiens_gene.h5", tmp_path / "other.h5")
    shutil.copy(tmp_path / "other.h5", tmp_path / "gene.h5")
    with h5py.File(tmp_path / "gene.h5", "r+") as file:
        del file[name]
        file[name] = h5py.ExternalLink("other.h5", name)
    with pytest.raises(CheckpointError, match=rf"gene\.h5: /{name} is an external link to another file, 'other\.h5'"):
        read(tmp_path / "gene.h5")
    assert len(read_gene_ids(tmp_path / "gene.h5", allow_external=True)) > 0
    assert len(read_protein_embeddings([tmp_path / "gene.h5"], allow_external=True)[0]) > 0


def test_single_embedding_in_another_file_is_refused(tmp_path: Path) -> None:
    shutil.copy(CHECKPOINT / "vocabs" / "homo_sapiens_gene.h5", tmp_path / "gene.h5")
    (tmp_path / "secret").write_bytes(SECRET)
    gene = read_gene_ids(tmp_path / "gene.h5")[3]
    with h5py.File(tmp_path / "gene.h5", "r+") as file:
        shape = file[f"arrays/{gene}"].shape
        del file[f"arrays/{gene}"]
        file["arrays"].create_dataset(gene, shape, "u1", external=[(str(tmp_path / "secret"), 0, shape[0])])
    with pytest.raises(CheckpointError, match=rf"arrays/{gene} is stored in another file"):
        read_protein_embeddings([tmp_path / "gene.h5"])


def test_vocabulary_outside_the_checkpoint_is_refused(checkpoint_copy: Path, tmp_path: Path) -> None:
    vocab = checkpoint_copy / "vocabs" / "homo_sapiens_gene.h5"
    shutil.move(vocab, tmp_path / "gene.h5")
    vocab.symlink_to(tmp_path / "gene.h5")
    with pytest.raises(CheckpointError, match=r"homo_sapiens_gene\.h5: is a link out of the folder, .*--allow"):
        load_checkpoint(checkpoint_copy, load_config(checkpoint_copy))
    options = {"model.data_config.allow_external_links": True}
    load_checkpoint(checkpoint_copy, load_config(checkpoint_copy, options))


def endless() -> Generator[None]:
    while True:
        pass
    yield


def crash() -> Generator[None]:
    os.kill(os.getpid(), signal.SIGSEGV)
    yield


@pytest.mark.parametrize(("steps", "message"), [(endless, "never ends"), (crash, "crashes")])
def test_crashing_or_hanging_read_is_an_error(steps: Callable[[], Generator[None]], message: str) -> None:
    with pytest.raises(CrashedError, match=message):
        run_isolated(steps)


def test_errors_of_isolated_reads_are_raised() -> None:
    def refuse() -> Generator[None]:
        yield
        raise DataError("no")

    def fail() -> Generator[None]:
        yield
        raise KeyError("lost")

    with pytest.raises(DataError, match=r"^no$"):
        run_isolated(refuse)
    with pytest.raises(RuntimeError, match="'lost'"):
        run_isolated(fail)


def test_killed_read_is_not_taken_for_damage() -> None:
    """Such as by the system, which is short of memory."""

    def be_killed() -> Generator[None]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield

    with pytest.raises(TranscriptFormerError, match="was killed by SIGKILL; is there enough memory"):
        run_isolated(be_killed)


@pytest.mark.parametrize("error", [MemoryError("1 PiB"), OSError(errno.EIO, "Input/output error")])
def test_errors_of_the_system_keep_their_type(error: Exception) -> None:
    def fail() -> Generator[None]:
        yield
        raise error

    with pytest.raises(type(error), match=r"1 PiB|Input/output error"):
        run_isolated(fail)


def test_isolated_reads_return_a_value() -> None:
    def find() -> Generator[None, None, list[int]]:
        yield
        return [os.getpid()]

    assert run_isolated(find) != [os.getpid()]


def test_file_is_read_while_sigchld_is_ignored(folder: Path) -> None:
    code = """
import signal, sys
from transcriptformer.data.source import open_source
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as a parent process may do
print(len(open_source(sys.argv[1])))
"""
    done = subprocess.run([sys.executable, "-c", code, folder / "cells.h5ad"], capture_output=True, text=True)
    assert done.stdout.strip() == str(N_CELLS), done.stderr


def test_isolated_read_ends_with_a_killed_parent() -> None:
    code = """
import os, time
from transcriptformer.runtime.isolated import run_isolated

def steps():
    print(os.getpid(), flush=True)
    while True:
        time.sleep(0.01)
        yield

run_isolated(steps)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        deadline = time.monotonic() + 2
        with suppress(psutil.NoSuchProcess):
            while child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
                time.sleep(0.01)
            is_over = child.status() == psutil.STATUS_ZOMBIE
            child.kill()
            assert is_over


def test_damage_in_unread_data_is_an_error(folder: Path) -> None:
    with h5py.File(folder / "cells.h5ad", "r+") as file:
        place = h5py.h5o.get_info(file.create_group("uns/more").id).addr
    with (folder / "cells.h5ad").open("r+b") as opened:
        opened.seek(place)
        opened.write(b"\xff" * 8)
    with pytest.raises(DataError, match=r"cells\.h5ad: cannot be read: truncated or damaged"):
        read_all(folder)


def test_a_file_is_looked_at_in_a_child_process_only_when_it_is_new_or_has_changed(folder: Path) -> None:
    path = folder / "cells.h5ad"
    found = []
    for change in (False, False, True):
        if change:
            with h5py.File(path, "r+") as file:
                file["uns"].attrs["note"] = "new"
        before = len(forks)
        open_source(path)
        found.append(len(forks) - before)
    assert found == [1, 0, 1]


def test_a_changed_file_is_refused_although_it_was_intact_before(folder: Path) -> None:
    read_all(folder)
    rewrite(folder, counts_elsewhere)
    with pytest.raises(DataError, match="X/data is stored in another file"):
        read_all(folder)


def test_a_file_that_may_refer_to_others_is_looked_at_each_time(folder: Path) -> None:
    rewrite(folder, counts_elsewhere)
    read_all(folder, True)
    (folder / "counts").unlink()
    with pytest.raises(DataError, match="missing or too short"):
        read_all(folder, True)


def test_counts_that_are_damaged_and_not_read_are_no_reason_to_refuse_a_file(folder: Path) -> None:
    adata = random_adata(N_CELLS)
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(folder / "cells.h5ad")
    rewrite(folder, counts_elsewhere)
    cells = open_source(folder / "cells.h5ad", DataConfig(layer="counts"))
    np.testing.assert_array_equal(cells.counts(0, N_CELLS).toarray(), adata.X.toarray())


@pytest.mark.slow
def test_damaged_unread_heap_is_harmless(folder: Path) -> None:
    """A file too large to be hashed completely, with an unused attribute that HDF5 hangs on."""
    path = folder / "cells.h5ad"
    with h5py.File(path, "r+") as file:
        file["uns"].create_dataset("large", (FULL_HASH_BYTES,), "u1")[-1] = 1
        file["uns"].attrs["note"] = "x" * 100
    with path.open("r+b") as opened:
        content = opened.read()
        heap = content.rindex(b"GCOL")
        assert content.index(b"x" * 100, heap) == heap + 32
        opened.seek(heap + 16)
        opened.write(bytes(120))
    assert fingerprint(path) != fingerprint(folder / "other.h5ad")
    assert len(read_all(folder)) == N_CELLS


def test_signal_during_a_fork_is_not_lost() -> None:
    """Python prints and swallows exceptions in fork hooks, such as that of `logging`."""
    code = """
import os, signal
from transcriptformer.runtime.isolated import run_isolated
from transcriptformer.runtime.signals import TerminatedError, handle_signals

def steps():
    return 1
    yield

for hook in ("before", "after_in_parent"):
    os.register_at_fork(**{hook: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with handle_signals():
        try:
            run_isolated(steps)
        except TerminatedError:
            print("ended")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\nended\n", "")
