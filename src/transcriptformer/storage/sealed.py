"""Sealed files: arrays or JSON with a checksum over the whole content, so that damage is always detected.

Arrays are stored in the safetensors format, readable by any of its readers. This implementation writes large arrays
without copying them and reads parts without memory-mapping.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transcriptformer.errors import DamagedError, OutputError, one_line
from transcriptformer.storage.atomic import atomic_write

Arrays = Mapping[str, np.ndarray | Sequence[np.ndarray]]
"""Arrays by name; sequences are concatenated along the first axis."""

_DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_NO_SEAL = "0" * 64
_SEAL, _METADATA = "sha256", "__metadata__"
_MAX_HEADER = 2**20
_CHUNK = 2**20

_FORMAT_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class StoredArray(NamedTuple):
    """Type, shape and offset of an array in a sealed file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def n_items(self) -> int:
        """Number of items."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        return self.n_items * self.dtype.itemsize


def write_sealed(path: Path, arrays: Arrays, metadata: Mapping[str, str] | None = None) -> None:
    """Atomically write arrays of bool, uint8, int32, int64, float32 or float64.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    parts = {name: [a] if isinstance(a, np.ndarray) else list(a) for name, a in arrays.items()}
    header: dict[str, Any] = {_METADATA: {**(metadata or {}), _SEAL: _NO_SEAL}}
    end = 0
    for name, several in parts.items():
        start, end = end, end + sum(array.nbytes for array in several)
        shape = [sum(len(array) for array in several), *several[0].shape[1:]] if several[0].ndim else []
        dtype = _NAMES[several[0].dtype.newbyteorder("<")]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        for block in _blocks(text, parts):
            digest.update(block)
            file.write(block)
        file.seek(8 + text.index(_NO_SEAL.encode()))
        file.write(digest.hexdigest().encode())


def _blocks(text: bytes, parts: Mapping[str, Sequence[np.ndarray]]) -> Iterator[Any]:
    yield len(text).to_bytes(8, "little")
    yield text
    for several in parts.values():
        for array in several:
            yield np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


class SealedFile:
    """A sealed file, open for reading; `verify` checks its checksum.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    metadata
        Metadata given to `write_sealed`.
    arrays
        Type, shape and offset of each array.

    Raises
    ------
    DamagedError
        If the file is missing or not a sealed file.
    OutputError
        If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header = file.read(length) if length <= _MAX_HEADER else b""
            self.size = os.fstat(file.fileno()).st_size
            header = json.loads(self._header)
            self.metadata: dict[str, str] = header.pop(_METADATA)
            self._seal = self.metadata.pop(_SEAL).encode()
            self.arrays = {name: self._stored(8 + length, **array) for name, array in header.items()}

    def _stored(self, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> StoredArray:
        first, last = data_offsets
        stored = StoredArray(_DTYPES[dtype], tuple(map(int, shape)), start + first)
        if stored.n_bytes != last - first or not start <= stored.offset <= start + last <= self.size:
            raise ValueError("array outside the file")
        return stored

    def verify(self) -> None:
        """Read the whole file and raise DamagedError if its checksum is wrong."""
        digest = self._digest()
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(8 + len(self._header))
            while block := file.read(_CHUNK):
                digest.update(block)
        self._compare(digest)

    def read(self, name: str) -> np.ndarray:
        """Read a whole array.

        Raises
        ------
        DamagedError
            If the file is missing or too short.
        OutputError
            If it cannot be read.
        """
        array = self.arrays[name]
        with _reading(self.path):
            return np.fromfile(self.path, array.dtype, array.n_items, offset=array.offset).reshape(array.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read the rows in [start, stop) of an array; raises the errors of `read`, and IndexError for other rows."""
        array = self.arrays[name]
        if not 0 <= start <= stop <= array.shape[0]:
            raise IndexError(f"{self.path}: {name} has {array.shape[0]} rows, not {start} to {stop}")
        width = array.n_items // max(1, array.shape[0])
        offset = array.offset + start * width * array.dtype.itemsize
        with _reading(self.path):
            values = np.fromfile(self.path, array.dtype, (stop - start) * width, offset=offset)
            return values.reshape(stop - start, *array.shape[1:])

    def read_verified(self) -> dict[str, np.ndarray]:
        """Read all arrays and verify the bytes just read, even if the file is replaced meanwhile.

        Raises
        ------
        DamagedError
            If the checksum is wrong.
        OutputError
            If the file cannot be read.
        """
        digest, values = self._digest(), {}
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(8 + len(self._header))
            for name, array in self.arrays.items():
                values[name] = np.fromfile(file, array.dtype, array.n_items).reshape(array.shape)
                digest.update(values[name].reshape(-1).view(np.uint8).data)
            digest.update(file.read(1))
        self._compare(digest)
        return values

    def _digest(self) -> Any:
        digest = hashlib.sha256(len(self._header).to_bytes(8, "little"))
        digest.update(self._header.replace(self._seal, _NO_SEAL.encode(), 1))
        return digest

    def _compare(self, digest: Any) -> None:
        if digest.hexdigest().encode() != self._seal:
            raise _damaged(self.path)


def read_sealed(path: Path) -> dict[str, np.ndarray]:
    """Read and verify all arrays of a sealed file.

    Raises
    ------
    DamagedError
        If it is missing, truncated or altered.
    """
    return SealedFile(path).read_verified()


def write_json(path: Path, values: Any) -> None:
    """Atomically write JSON with a checksum.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(sealed_json(values), encoding="utf-8")


def sealed_json(values: Any) -> str:
    """Serialize values to JSON with a checksum, for `read_json`."""
    return json.dumps({_SEAL: _json_seal(values), "values": values}, indent=1)


def read_json(path: Path) -> Any:
    """Read and verify a file from `write_json`.

    Raises
    ------
    DamagedError
        If it is missing, truncated or altered.
    """
    with _reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        values, seal = content["values"], content[_SEAL]
    if seal != _json_seal(values):
        raise _damaged(path)
    return values


def _json_seal(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: missing") from error
    except OSError as error:  # does not mean that the content is damaged
        raise OutputError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error
    except _FORMAT_ERRORS as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> DamagedError:
    """Create the error for a file with unexpected content."""
    return DamagedError(f"{path}: truncated, damaged or written by another version")
