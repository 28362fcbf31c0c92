"""The folder beside a result in which a run keeps what it has, until the result is whole; and whether it may go on."""

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
from transcriptformer.storage.results import cannot_keep
from transcriptformer.storage.sealed import read_json, read_sealed, write_json, write_sealed

logger = logging.getLogger(__name__)


class Workspace:
    """`<result>.parts`, with `run.json`, which says what is computed there, and whatever that run keeps.

    Parameters
    ----------
    output
        The result to be.

    Attributes
    ----------
    lock
        Taken before anything is looked at or changed here; it lies beside the folder, which comes and goes.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.parts")
        self.lock = RunLock(output.with_name(f".{output.name}.lock"))

    @contextmanager
    def locked(self, resume: bool) -> Iterator[None]:
        """Keep other runs out, then look: without `resume`, an earlier run must not have left anything.

        Raises
        ------
        UsageError
            If another run is at work here, or an earlier one left something.
        """
        self.lock.acquire(self.folder)
        try:
            if self.exists and not resume:
                raise UsageError(
                    f"{self.folder}: holds what an earlier run has computed; add --resume to go on with it, or delete "
                    "that folder to begin anew"
                )
            yield
        finally:
            self.lock.release()

    @property
    def exists(self) -> bool:
        """Whether an earlier run left something to go on with."""
        return self._run_json.is_file()

    def continues(self, identity: Mapping[str, Any]) -> bool:
        """Whether an earlier run of the same left something to continue.

        Raises
        ------
        UsageError
            If what is here is of other inputs, another checkpoint or other settings, or nothing says of what.
        DamagedError
            If what says so is damaged.
        """
        if self.exists:
            check_same(self._run()["identity"], identity, self.folder)
            return True
        if any(self.folder.glob("p*-*.safetensors")):
            raise UsageError(
                f"{self.folder}: holds results of an earlier run, but {self._run_json.name}, which says of what, is "
                "missing; delete that folder to begin anew"
            )
        return False

    @contextmanager
    def create(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Begin anew; what is to be known of the run from the start is written within."""
        try:
            with writing(self.folder):
                remove(self.folder)
                remove(temporary_path(self.folder))
                self.folder.mkdir()
                sync_folder(self.folder.parent)
            yield
            write_json(self._run_json, {"id": secrets.token_hex(16), "identity": identity})
        except OutputError as error:
            raise cannot_keep(self.folder, error) from error

    @property
    def run_id(self) -> str:
        """Random id of the run that the folder was made for."""
        return str(self._run()["id"])

    def note_done(self, is_done: np.ndarray) -> None:
        """Note which of the kept cells (cells,) need not be computed: the same for all processes of a run."""
        try:
            write_sealed(self.folder / "done.safetensors", {"done": is_done})
        except OutputError as error:
            raise cannot_keep(self.folder, error) from error

    def done(self) -> np.ndarray:
        """What was noted: a mask (kept cells,)."""
        return read_sealed(self.folder / "done.safetensors")["done"]

    def remove(self) -> None:
        """Delete it all; the result is whole."""
        leaving = temporary_path(self.folder)
        remove(leaving)
        with suppress(OSError):
            self.folder.rename(leaving)  # at once: a kill must not leave a part of it
        remove(leaving)
        remove(self.folder)
        if self.folder.exists():
            logger.warning("%s: cannot be deleted; it is not needed any more", self.folder)

    @property
    def _run_json(self) -> Path:
        return self.folder / "run.json"

    def _run(self) -> dict[str, Any]:
        try:
            return read_json(self._run_json)
        except DamagedError as error:
            raise DamagedError(f"{error}; delete {self.folder} to begin anew") from error


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Raise UsageError where the run that a folder holds is not the one that is to go on."""
    changes = list(differences(old, new))
    if changes:
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise UsageError(
            f"--resume: {folder} holds another run; changed: {'; '.join(changes[:5])}{more}; undo the change, "
            "or delete that folder to begin anew"
        )


def is_same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two identities are of the same run."""
    return next(differences(old, new), None) is None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What changed, in words."""
    before, after = (dict(flat(json.loads(json.dumps(identity)))) for identity in (old, new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"{key} was {before.get(key)}, is {after.get(key)}"


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values with their dotted paths."""
    items: Any = values.items() if isinstance(values, Mapping) else enumerate(values)
    for key, value in items:
        if isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
