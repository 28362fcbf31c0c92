"""Folder for the intermediate results of a run, next to its output, and checks that a run may resume from it."""

import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from transcriptformer.errors import DamagedError, OutputError, UsageError
from transcriptformer.storage.atomic import remove, sync_folder, temporary_path, writing
from transcriptformer.storage.lock import RunLock
from transcriptformer.storage.results import cannot_write_results
from transcriptformer.storage.sealed import read_json, read_sealed, write_json, write_sealed

logger = logging.getLogger(__name__)


class Workspace:
    """Folder `<result>.parts` with the intermediate results of a run, which `run.json` identifies.

    Parameters
    ----------
    output
        Path of the final result.

    Attributes
    ----------
    lock
        Held for all access to the folder; its file is next to the folder, which may be deleted.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.parts")
        self.lock = RunLock(output.with_name(f".{output.name}.lock"))

    @contextmanager
    def locked(self, resume: bool) -> Iterator[None]:
        """Hold the lock; without `resume`, refuse results of an earlier run.

        Raises
        ------
        UsageError
            If another run holds the lock, or an earlier run left results.
        """
        self.lock.acquire(self.folder)
        try:
            if self.exists and not resume:
                raise UsageError(
                    f"{self.folder}: contains results of an earlier run; add --resume to continue it, or delete the "
                    "folder to start over"
                )
            yield
        finally:
            self.lock.release()

    @property
    def exists(self) -> bool:
        """Whether an earlier run left results."""
        return self._run_json.is_file()

    def can_resume(self, identity: Mapping[str, Any]) -> bool:
        """Whether an earlier run with the same identity left results to resume from.

        Raises
        ------
        UsageError
            If the results have other inputs, another checkpoint or other settings, or `run.json` is missing.
        DamagedError
            If `run.json` is damaged.
        """
        if self.exists:
            check_same_run(self._run()["identity"], identity, self.folder)
            return True
        if any(self.folder.glob("p*-*.safetensors")):
            raise UsageError(
                f"{self.folder}: contains results of an earlier run, but {self._run_json.name} is missing; delete the "
                "folder to start over"
            )
        return False

    @contextmanager
    def create(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Create an empty folder, and write `run.json` at the end of the block."""
        try:
            with writing(self.folder):
                remove(self.folder)
                remove(temporary_path(self.folder))
                self.folder.mkdir()
                sync_folder(self.folder.parent)
            yield
            write_json(self._run_json, {"id": secrets.token_hex(16), "identity": identity})
        except OutputError as error:
            raise cannot_write_results(self.folder, error) from error

    @property
    def run_id(self) -> str:
        """Random id of the run."""
        return str(self._run()["id"])

    def write_done_mask(self, is_done: np.ndarray) -> None:
        """Write the mask (kept cells,) of finished cells, shared by all processes of the run."""
        try:
            write_sealed(self.folder / "done.safetensors", {"done": is_done})
        except OutputError as error:
            raise cannot_write_results(self.folder, error) from error

    def read_done_mask(self) -> np.ndarray:
        """Read the mask (kept cells,) of finished cells."""
        return read_sealed(self.folder / "done.safetensors")["done"]

    def remove(self) -> None:
        """Delete the folder."""
        renamed = temporary_path(self.folder)
        remove(renamed)
        with suppress(OSError):
            self.folder.rename(renamed)  # atomic: a kill must not leave a partial folder
        remove(renamed)
        remove(self.folder)
        if self.folder.exists():
            logger.warning("%s: cannot be deleted; it is no longer needed", self.folder)

    @property
    def _run_json(self) -> Path:
        return self.folder / "run.json"

    def _run(self) -> dict[str, Any]:
        try:
            return read_json(self._run_json)
        except DamagedError as error:
            raise DamagedError(f"{error}; delete {self.folder} to start over") from error


def check_same_run(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Raise UsageError if the identity of the run in a folder differs from the new one."""
    changes = list(differences(old, new))
    if changes:
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise UsageError(
            f"--resume: {folder} contains a different run; changed: {'; '.join(changes[:5])}{more}; undo the change, "
            "or delete the folder to start over"
        )


def is_same_run(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two identities are equal."""
    return next(differences(old, new), None) is None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Describe each difference between two identities."""
    before, after = (dict(flatten(json.loads(json.dumps(identity)))) for identity in (old, new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"{key} was {before.get(key)}, is {after.get(key)}"


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over nested values and their dotted paths."""
    items: Any = values.items() if isinstance(values, Mapping) else enumerate(values)
    for key, value in items:
        if isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
