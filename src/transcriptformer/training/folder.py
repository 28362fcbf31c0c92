"""The folder of a training run: what comes out, and what a killed run goes on from."""

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
from transcriptformer.storage.workspace import check_same

logger = logging.getLogger(__name__)

BEGIN_ANEW = "name another folder by --output-path to begin anew"


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
        self.survey, self.statistics = self.state / "survey.safetensors", self.state / "statistics.safetensors"
        self.baseline = self.state / "baseline.json"
        self._lock = RunLock(self.state / "lock")

    @property
    def is_complete(self) -> bool:
        """Whether a run has come to its end here."""
        return (self.checkpoint / "config.json").is_file()

    def lock(self) -> None:
        """Make the folder and keep other runs out until `end`.

        Raises
        ------
        UsageError
            If another run is at work there.
        OutputError
            If it cannot be written to.
        """
        with writing(self.path):
            make_folder(self.state)
        self._lock.acquire(self.path)

    def begin(self, identity: Mapping[str, Any], config_yaml: str, resume: bool) -> None:
        """See that the folder, which is locked, holds this very run, or begin it.

        A run that has not saved anything yet, such as one that was refused its input, is begun anew.

        Raises
        ------
        UsageError
            If it holds another run, or one that is not to be resumed.
        OutputError
            If it cannot be written to.
        """
        if self.last.is_file() or self.is_complete:
            if not resume:
                raise UsageError(
                    f"--output-path {self.path}: holds an earlier run; add --resume to go on with it, or name another "
                    "folder"
                )
            try:
                check_same(read_json(self.run), identity, self.path)
            except DamagedError as error:
                raise DamagedError(f"{error}; {BEGIN_ANEW}") from error
            return
        if resume and self.run.is_file():
            logger.warning("%s: missing; training begins anew", self.last)
        with writing(self.path):
            for old in (self.survey, self.statistics, self.baseline, self.best):
                old.unlink(missing_ok=True)
        with atomic_write(self.config) as temporary:
            temporary.write_text(config_yaml, encoding="utf-8")
        write_json(self.run, identity)

    def end(self) -> None:
        """Let other runs in."""
        self._lock.release()


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
            with atomic_write(final) as temporary:
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
            with zipfile.ZipFile(path) as file:  # PyTorch does not compare the checksums
                damaged = file.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(damaged)
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the reader raises whatever a damaged file leads it to
            how = "truncated or damaged" if Path(path).exists() else "missing"
            raise CheckpointError(f"{path}: {how}; {BEGIN_ANEW}") from error
