"""The folder of a training run: what comes out, and what a killed run goes on from."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from transcriptformer.errors import OutputError, UsageError, one_line
from transcriptformer.workspace import PATIENCE, differences


class TrainingFolder:
    """Names what lies in the folder.

    Parameters
    ----------
    path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.state = path, path / "state"
        self.checkpoint = path / "checkpoint"
        self.config, self.metrics, self.plot = path / "config.yaml", path / "metrics.csv", path / "loss.png"
        self.run = self.state / "run.json"
        self.last, self.best = self.state / "last.ckpt", self.state / "best.ckpt"
        self.survey, self.statistics = self.state / "survey.npz", self.state / "statistics.npz"
        self.baseline = self.state / "baseline.json"
        self._lock = filelock.FileLock(self.state / "lock")

    @property
    def is_complete(self) -> bool:
        """Whether a run has come to its end here."""
        return (self.checkpoint / "config.json").is_file()

    def begin(self, identity: Mapping[str, Any], config_yaml: str, resume: bool) -> None:
        """Make the folder, or see that it holds this very run; keep other runs out until `end`.

        Raises
        ------
        UsageError
            If it holds another run, or one that is not to be resumed.
        OutputError
            If it cannot be written to.
        """
        if self.run.is_file():
            if not resume:
                raise UsageError(
                    f"--output-path {self.path}: holds an earlier run; add --resume to go on with it, or name another "
                    "folder"
                )
            changes = list(differences(json.loads(self.run.read_text(encoding="utf-8")), identity))
            if changes:
                raise UsageError(f"--resume: {self.path} holds another run; changed: {'; '.join(changes[:5])}")
        with self.writing():
            self.state.mkdir(parents=True, exist_ok=True)
            self._acquire()
            if not self.run.is_file():
                self.config.write_text(config_yaml, encoding="utf-8")
                write_whole(self.run, json.dumps(identity, indent=1).encode())

    def end(self) -> None:
        """Let other runs in."""
        self._lock.release()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raise what keeps a file from being written as OutputError."""
        try:
            yield
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror or one_line(error)})") from error

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=PATIENCE)
        except filelock.Timeout as error:
            raise UsageError(f"{self.path}: another run is at work there; wait until it is done") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and move it into place when it is safely on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class WholeFiles(TorchCheckpointIO):
    """Saves the state of training such that the last good one stays until the next is whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write under a temporary name, then move.

        Raises
        ------
        OutputError
            If there is no room.
        """
        final = Path(path)
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
        except (OSError, RuntimeError) as error:  # PyTorch's writer has an error of its own for a full disk
            kept = f"; {final} is still that of an earlier step" if final.exists() else ""
            raise OutputError(
                f"{final}: cannot be written ({one_line(error)}){kept}; make room, then go on with --resume"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, *unused: Any, **options: Any) -> dict[str, Any]:
        """Read what was saved; nothing in it is executed."""
        return torch.load(path, map_location="cpu", weights_only=True)
