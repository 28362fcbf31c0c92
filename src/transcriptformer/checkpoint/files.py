"""Files of a checkpoint folder that came from elsewhere: JSON that is read with limits, and names that stay inside."""

import json
from pathlib import Path
from typing import Any

from transcriptformer.errors import CheckpointError, one_line
from transcriptformer.storage.external import OPTION

MOST_BYTES = 2**26
"""No JSON file of a checkpoint is larger; those of the published ones take kilobytes."""


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises
    ------
    FileNotFoundError
        If it is missing.
    CheckpointError
        If it is not JSON, is very large or deeply nested, or has a key twice.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise CheckpointError(f"{path}: {size:,} bytes of JSON; at most {MOST_BYTES:,} are read")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise
    except RecursionError:
        raise CheckpointError(f"{path}: not readable as JSON (nested too deeply)") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({one_line(error)})") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is there twice")
    return values


def file_in(folder: Path, name: str, allow_external: bool) -> Path:
    """The file of that plain name in a folder.

    Raises
    ------
    CheckpointError
        If it is a symbolic link out of the folder, and that is not allowed.
    """
    path = folder / name
    target = path.resolve()
    if not allow_external and target.parent != folder.resolve():
        raise CheckpointError(f"{path}: is a link out of the folder, to {str(target)!r}; to follow it, add {OPTION}")
    return path
