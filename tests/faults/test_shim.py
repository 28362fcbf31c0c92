"""The preloaded shim counts the calls that change files below a folder, and makes selected ones fail."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.injection import build_shim, skip_reason

pytestmark = pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())

PRELUDE = """
import ctypes, json, os, shutil, sys
shim = ctypes.CDLL(None)
shim.faults_n_calls.restype = shim.faults_n_failed.restype = ctypes.c_long
shim.faults_call.restype = ctypes.c_char_p

def arm(first, error=0, for_good=False, deletions_work=False):
    folder = os.fsencode(os.path.abspath("below"))
    assert shim.faults_arm(folder, ctypes.c_long(first), error, for_good, deletions_work) == 0

def calls():
    return [shim.faults_call(ctypes.c_long(n + 1)).decode() for n in range(shim.faults_n_calls())]

def attempt(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except OSError as error:
        return error.errno
    return 0
"""

Run = Callable[[str], Any]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def run(shim: Path, tmp_path: Path) -> Run:
    """Run a script in `tmp_path`, counting calls below `below`, and return its variable `answer`."""
    (tmp_path / "below").mkdir()

    def run_script(script: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", f"{PRELUDE}\n{script}\nprint(json.dumps(answer))"],
            env={**os.environ, "LD_PRELOAD": str(shim)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    return run_script


CALLS = """
descriptor = os.open("below/a", os.O_WRONLY | os.O_CREAT)
os.write(descriptor, b"1234")
os.pwrite(descriptor, b"5678", 4)
os.writev(descriptor, [b"90"])
os.ftruncate(descriptor, 3)
os.posix_fallocate(descriptor, 0, 8)
os.fdatasync(descriptor)
os.fsync(descriptor)
os.close(descriptor)
os.mkdir("below/folder")
os.rename("below/a", "below/folder/b")
shutil.copyfile("below/folder/b", "below/c")
folder = os.open("below/folder", os.O_RDONLY)
os.mkdir("d", dir_fd=folder)
os.rename("b", "d/b", src_dir_fd=folder, dst_dir_fd=folder)
os.fsync(folder)
os.close(folder)
shutil.rmtree("below/folder")
os.unlink("below/c")
os.mkdir("below/e")
os.rmdir("below/e")
libc = ctypes.CDLL(None)
libc.fopen.restype, libc.fclose.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.fclose(libc.fopen(b"below/f", b"w"))
"""
"""Every kind of call, through ctypes where Python has no function for it."""

EXPECTED = """
open a; write a; pwrite a; write a; ftruncate a; fallocate a; fdatasync a; fsync a; close a
mkdir folder; rename folder/b; open c; write c; write c; close c
mkdir folder/d; rename folder/d/b; fsync folder
unlink folder/d/b; rmdir folder/d; rmdir folder; unlink c; mkdir e; rmdir e
open f; close f
"""
"""`copyfile` writes twice: all data, then an empty rest."""


def test_every_call_below_the_folder_is_counted(run: Run, tmp_path: Path) -> None:
    counted = run(f"arm(0)\n{CALLS}\nanswer = calls(), shim.faults_n_failed()")
    expected = EXPECTED.strip().replace("\n", "; ").split("; ")
    below = f"{tmp_path}/below"
    assert counted == [[f"{call.split()[0]} {below}/{call.split()[1]}" for call in expected], 0]


def test_reads_and_other_folders_are_not_counted(run: Run, tmp_path: Path) -> None:
    (tmp_path / "below" / "a").write_text("a")
    (tmp_path / "below-not").mkdir()
    script = """
arm(0)
open("below/a").read()
os.listdir("below")
open("other", "w").write("other")
open("below-not/a", "w").write("other")
os.rename("other", "another")
answer = calls()
"""
    assert run(script) == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_one_call_fails_and_the_next_ones_work(error: int, run: Run) -> None:
    script = f"""
arm(3, {error})
answer = [attempt(os.mkdir, f"below/{{i}}") for i in range(5)], shim.faults_n_failed(), sorted(os.listdir("below"))
"""
    assert run(script) == [[0, 0, error, 0, 0], 1, ["0", "1", "3", "4"]]


@pytest.mark.parametrize("deletions_work", [False, True])
def test_all_later_calls_can_fail_too(deletions_work: bool, run: Run) -> None:
    script = f"""
arm(2, {errno.ENOSPC}, True, {deletions_work})
made = [attempt(os.mkdir, f"below/{{i}}") for i in range(3)]
answer = made, attempt(os.rmdir, "below/0"), attempt(os.rename, "other", "below/other"), shim.faults_n_failed()
"""
    full = errno.ENOSPC
    assert run(script) == [[0, full, full], 0 if deletions_work else full, full, 3 if deletions_work else 4]


def test_failed_write_leaves_half_of_its_bytes_and_failed_close_closes(run: Run, tmp_path: Path) -> None:
    script = f"""
arm(2, {errno.EIO})
descriptor = os.open("below/a", os.O_WRONLY | os.O_CREAT)
written = attempt(os.write, descriptor, b"12345678")
arm(1, {errno.EIO})
answer = written, attempt(os.close, descriptor), attempt(os.close, descriptor)
"""
    assert run(script) == [errno.EIO, errno.EIO, errno.EBADF]
    assert (tmp_path / "below" / "a").read_text() == "1234"


def test_calls_of_forked_processes_are_counted(run: Run) -> None:
    script = f"""
arm(2, {errno.EIO})
os.mkdir("below/a")
child = os.fork()
if child == 0:
    os._exit(attempt(os.mkdir, "below/b"))
_, status = os.waitpid(child, 0)
answer = os.waitstatus_to_exitcode(status), attempt(os.mkdir, "below/c"), shim.faults_n_calls()
"""
    assert run(script) == [errno.EIO, 0, 3]
