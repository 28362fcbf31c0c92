"""The output folder of a training run, and the state that a resumed run continues from."""

import errno
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from transcriptformer.errors import CheckpointError, DamagedError, OutputError, UsageError, one_line
from transcriptformer.storage.atomic import atomic_write, make_folder, writing
from transcriptformer.storage.lock import RunLock
from transcriptformer.storage.sealed import read_json, write_json
from transcriptformer.storage.workspace import check_same_run

logger = logging.getLogger(__name__)

START_OVER = "choose another --output-path to start over"


class TrainingFolder:
    """The files of a training run, and their lock.

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
        self.survey, self.statistics = self.state / "survey.safetensors", self.state / "statistics.safetensors"
        self.baseline = self.state / "baseline.json"
        self._lock = RunLock(self.state / "lock")

    @property
    def is_complete(self) -> bool:
        """Whether the folder holds a finished run."""
        return (self.checkpoint / "config.json").is_file()

    def lock(self) -> None:
        """Create the folder and lock it against other runs until `unlock`.

        Raises
        ------
        UsageError
            If another run holds the lock.
        OutputError
            If the folder cannot be written to.
        """
        with writing(self.path):
            make_folder(self.state)
        self._lock.acquire(self.path)

    def begin(self, identity: Mapping[str, Any], config_yaml: str, resume: bool) -> None:
        """Start a run in the locked folder, or check that it can be resumed.

        A run without any saved state, such as one whose input was refused, starts over.

        Raises
        ------
        UsageError
            If the folder holds another run, or `resume` is false and it holds any run.
        OutputError
            If the folder cannot be written to.
        """
        if self.last.is_file() or self.is_complete:
            if not resume:
                raise UsageError(
                    f"--output-path {self.path}: holds an earlier run; add --resume to continue it, or choose another "
                    "folder"
                )
            try:
                check_same_run(read_json(self.run), identity, self.path)
            except DamagedError as error:
                raise DamagedError(f"{error}; {START_OVER}") from error
            return
        if resume and self.run.is_file():
            logger.warning("%s: missing; training starts over", self.last)
        with writing(self.path):
            for old in (self.survey, self.statistics, self.baseline, self.best):
                old.unlink(missing_ok=True)
        with atomic_write(self.config) as temporary:
            temporary.write_text(config_yaml, encoding="utf-8")
        write_json(self.run, identity)

    def unlock(self) -> None:
        """Release the lock."""
        self._lock.release()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves the training state atomically: the last state is kept until the next one is complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a temporary file, then rename it.

        Raises
        ------
        OutputError
            If the disk is full.
        """
        final = Path(path)
        try:
            with atomic_write(final) as temporary:
                torch.save(checkpoint, temporary)
        except (OutputError, RuntimeError) as error:  # PyTorch raises RuntimeError when the disk is full
            kept = f"; {final} still holds the state of an earlier step" if final.exists() else ""
            raise OutputError(
                f"{final}: cannot be written ({one_line(error)}){kept}; free disk space, then rerun with --resume"
            ) from error

    def load_checkpoint(self, path: Any, *unused: Any, **options: Any) -> dict[str, Any]:
        """Load a state without executing code from it.

        Raises
        ------
        CheckpointError
            If the file is missing or damaged.
        OutputError
            If it cannot be read.
        """
        try:
            with zipfile.ZipFile(path) as file:  # PyTorch does not verify the checksums
                damaged = file.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(damaged)
            return torch.load(path, map_location="cpu", weights_only=True)
        except MemoryError as error:
            raise OutputError(f"{path}: not enough memory to read it") from error
        except Exception as error:  # a damaged file may raise any exception
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EINVAL):
                raise OutputError(f"{path}: cannot be read ({error.strerror})") from error
            how = "truncated or damaged" if Path(path).exists() else "missing"
            raise CheckpointError(f"{path}: {how}; {START_OVER}") from error
