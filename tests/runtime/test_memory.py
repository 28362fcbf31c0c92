"""Free memory is what this process may use, and lack of memory is recognized on any device."""

from pathlib import Path

import psutil
import pytest

from transcriptformer.runtime import memory
from transcriptformer.runtime.memory import available_memory, is_out_of_memory


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def left(tmp_path: Path, membership: str) -> list[int]:
    (tmp_path / "membership").write_text(membership)
    return list(memory._left_in_groups(tmp_path / "membership", tmp_path / "cgroup"))


def test_limits_of_all_enclosing_control_groups_count(tmp_path: Path) -> None:
    root, stat = tmp_path / "cgroup", "anon 1\ninactive_file 30"
    write(root)
    write(root / "job", memory__max=1000, memory__current=130, memory__stat=stat)
    write(root / "job/step", memory__max="max", memory__current=100, memory__stat=stat)
    write(root / "job/step/task", memory__max=500, memory__current=600, memory__stat=stat)
    assert left(tmp_path, "0::/job/step/task\n") == [0, 900]


def test_groups_of_version_1_count(tmp_path: Path) -> None:
    write(
        tmp_path / "cgroup/memory/slurm",
        memory__limit_in_bytes=1000,
        memory__usage_in_bytes=300,
        memory__stat="cache 5\ntotal_inactive_file 50",
    )
    assert left(tmp_path, "5:cpu:/slurm\n4:memory:/slurm\n") == [750]


def test_systems_without_control_groups_have_no_limit(tmp_path: Path) -> None:
    assert list(memory._left_in_groups(tmp_path / "missing", tmp_path)) == []
    assert left(tmp_path, "0::/\n") == []


def test_no_more_is_available_than_the_machine_has() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9.07 GB)", True),
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_lack_of_memory_is_recognized(message: str, expected: bool) -> None:
    assert is_out_of_memory(RuntimeError(message)) is expected
