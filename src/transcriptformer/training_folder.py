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

from transcriptformer.errors import CheckpointError, OutputError, UsageError, one_line
from transcriptformer.workspace import acquire, check_same


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

        A run that has not saved anything yet, such as one that was refused its input, is begun anew.

        Raises
        ------
        UsageError
            If it holds another run, or one that is not to be resumed.
        OutputError
            If it cannot be written to.
        """
        with writing(self.path):
            self.state.mkdir(parents=True, exist_ok=True)
        acquire(self._lock, self.path)
        if self.run.is_file() and (self.last.is_file() or self.is_complete):
            if not resume:
                raise UsageError(
                    f"--output-path {self.path}: holds an earlier run; add --resume to go on with it, or name another "
                    "folder"
                )
            check_same(json.loads(self.run.read_text(encoding="utf-8")), identity, self.path)
            return
        for old in (self.survey, self.statistics, self.baseline, self.best):
            old.unlink(missing_ok=True)
        with whole(self.config) as temporary:
            temporary.write_text(config_yaml, encoding="utf-8")
        with whole(self.run) as temporary:
            temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")

    def end(self) -> None:
        """Let other runs in."""
        self._lock.release()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise what keeps a file from being written as OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or one_line(error)})") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under, which is moved into place when it is safely on disk.

    Raises
    ------
    OutputError
        If it cannot be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            yield temporary
            with temporary.open("rb") as file:
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
        try:
            with whole(final) as temporary:
                torch.save(checkpoint, temporary)
        except (OutputError, RuntimeError) as error:  # PyTorch's writer has an error of its own for a full disk
            kept = f"; {final} is still that of an earlier step" if final.exists() else ""
            raise OutputError(
                f"{final}: cannot be written ({one_line(error)}){kept}; make room, then go on with --resume"
            ) from error

    def load_checkpoint(self, path: Any, *unused: Any, **options: Any) -> dict[str, Any]:
        """Read what was saved; nothing in it is executed.

        Raises
        ------
        CheckpointError
            If it is damaged.
        """
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the reader raises whatever a damaged file leads it to
            raise CheckpointError(f"{path}: truncated or damaged; without it, the run begins anew") from error
