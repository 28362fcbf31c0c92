"""The folder beside a result in which a run keeps what it has, until the result is whole; and whether it may go on."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from transcriptformer.config import Config
from transcriptformer.data.store import Location, Store, is_url, is_zarr
from transcriptformer.data.survey import Survey
from transcriptformer.errors import UsageError
from transcriptformer.parts import cannot_write

logger = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds to wait for the worker processes of a killed run, which notice its end after some seconds."""

_FREE_TO_CHANGE = {
    "model.data_config.n_data_workers",
    "model.data_config.block_size",
    *(
        f"model.inference_config.{name}"
        for name in (
            *("batch_size", "tokens_per_batch", "device", "attention", "num_gpus", "num_nodes", "oom_dataloader"),
            *("resume", "output_path", "output_filename", "pretrained_embedding"),
        )
    ),
}
"""Settings that say how to compute, not what; a run may go on with others. (Files are compared by what is in them.)"""


class Workspace:
    """`<result>.parts`, with `run.json`, which says what is computed there, and the survey of the cells.

    Parameters
    ----------
    output
        The result to be.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.parts")
        self._lock = filelock.FileLock(self.folder / "lock")

    @property
    def exists(self) -> bool:
        """Whether an earlier run left something to go on with."""
        return (self.folder / "run.json").is_file()

    def refuse_leftover(self) -> None:
        """Raise UsageError where an earlier run left something, which a new one would overwrite."""
        if self.exists:
            raise UsageError(
                f"{self.folder}: holds what an earlier run has computed; add --resume to go on with it, or delete that "
                "folder to begin anew"
            )

    def create(self, identity: Mapping[str, Any], survey: Survey | None = None) -> None:
        """Begin anew; a run over cells has a survey of them."""
        try:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir()
            self.lock()
            if survey is not None:
                survey.save(self.folder / "survey.npz")
            temporary = self.folder / "run.json.tmp"
            temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")
            temporary.replace(self.folder / "run.json")
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def lock(self) -> None:
        """Keep other runs out of the folder until `unlock`, or until this process ends, however it does.

        Raises
        ------
        UsageError
            If another run is at work there.
        """
        acquire(self._lock, self.folder)

    def unlock(self) -> None:
        """Let other runs in."""
        self._lock.release()

    def note_done(self, is_done: np.ndarray) -> None:
        """Note which of the kept cells (cells,) need not be computed: the same for all processes of a run."""
        try:
            np.save(self.folder / "done.npy", is_done)
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def done(self) -> np.ndarray:
        """What was noted: a mask (kept cells,)."""
        return np.load(self.folder / "done.npy")

    def survey(self) -> Survey:
        """The survey that was made when the run began."""
        return Survey.load(self.folder / "survey.npz")

    def identity(self) -> dict[str, Any]:
        """What is computed here."""
        return json.loads((self.folder / "run.json").read_text(encoding="utf-8"))

    def check_same(self, identity: Mapping[str, Any]) -> None:
        """Raise UsageError where the earlier run was of other inputs, another checkpoint or other settings."""
        check_same(self.identity(), identity, self.folder)

    def remove(self) -> None:
        """Delete it all; the result is whole."""
        (self.folder / "run.json").unlink(missing_ok=True)  # first: what a kill leaves of the rest is no run
        shutil.rmtree(self.folder, ignore_errors=True)


def acquire(lock: filelock.BaseFileLock, folder: Path) -> None:
    """Take the lock of a folder, if files can be locked there.

    Raises
    ------
    UsageError
        If another run holds it.
    """
    try:
        lock.acquire(timeout=PATIENCE)
    except filelock.Timeout as error:
        raise UsageError(f"{folder}: another process is at work there; wait until it is done") from error
    except (NotImplementedError, OSError):
        logger.warning("%s: files cannot be locked here; do not start a second run of the same", folder)


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Raise UsageError where the run that a folder holds is not the one that is to go on."""
    changes = list(differences(old, new))
    if changes:
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise UsageError(
            f"--resume: {folder} holds another run; changed: {'; '.join(changes[:5])}{more}; undo the change, "
            "or delete that folder to begin anew"
        )


def identify(locations: Sequence[Location], config: Config, compute_dtype: str, weights_sha256: str) -> dict[str, Any]:
    """What decides about the numbers of a run: settings, inputs, checkpoint."""
    settings = {key: value for key, value in flat(asdict(config)) if key not in _FREE_TO_CHANGE}
    files = [Path(file) for file in config.model.inference_config.pretrained_embedding]
    return {
        "settings": {**settings, "type of matrix products": compute_dtype},
        "inputs": [identify_location(location) for location in locations],
        "pretrained embeddings": [identify_location(file) for file in files],
        "checkpoint": {"weights": weights_sha256},
    }


def identify_location(location: Location) -> dict[str, Any]:
    """What tells versions of a file or store apart without reading it."""
    if is_url(location):
        root = Store(location).root
        shapes = {key: value.shape for key, value in root.members(max_depth=None) if hasattr(value, "shape")}
        return {"name": str(location), "shapes": {key: list(shape) for key, shape in sorted(shapes.items())}}
    path = Path(location)
    files = sorted(path.rglob("*")) if is_zarr(location) and path.is_dir() else [path]
    status = [file.stat() for file in files]
    return {
        # A path may hold bytes that are not text.
        "name": path.name.encode(errors="replace").decode(),
        "bytes": sum(file.st_size for file in status),
        "modified": max(file.st_mtime_ns for file in status),
    }


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
