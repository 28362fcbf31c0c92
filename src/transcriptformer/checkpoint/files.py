"""Safe access to the files of an untrusted checkpoint folder: size-limited JSON, and no links out of the folder."""

import json
from pathlib import Path
from typing import Any

from transcriptformer.errors import CheckpointError, one_line
from transcriptformer.storage.external import OPTION

MAX_JSON_BYTES = 2**26
"""Size limit of a checkpoint's JSON files; those of the published checkpoints take kilobytes."""


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises
    ------
    FileNotFoundError
        If it is missing.
    CheckpointError
        If it is not JSON, is too large or too deeply nested, or has duplicate keys.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size:,} bytes of JSON exceed the limit of {MAX_JSON_BYTES:,}")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise
    except RecursionError:
        raise CheckpointError(f"{path}: cannot be parsed as JSON (nested too deeply)") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be parsed as JSON ({one_line(error)})") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {duplicate!r}")
    return values


def file_in(folder: Path, name: str, allow_external: bool) -> Path:
    """Return the path of a file in a folder.

    Raises
    ------
    CheckpointError
        If it is a symbolic link out of the folder and `allow_external` is false.
    """
    path = folder / name
    target = path.resolve()
    if not allow_external and target.parent != folder.resolve():
        raise CheckpointError(f"{path}: is a link out of the folder, to {str(target)!r}; add {OPTION} to follow it")
    return path
