"""Lightning's Trainer, without what it has to say, and with its ways of failing put plainly."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch

from transcriptformer.errors import TranscriptFormerError
from transcriptformer.runtime.parents import lost_worker
from transcriptformer.runtime.signals import RESUME
from transcriptformer.runtime.watchdog import ProcessEndedError

_LOST_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:exited unexpectedly|is killed)")
"""What PyTorch says of data workers that are gone."""


@contextmanager
def plain_lightning(trainer: pl.Trainer) -> Iterator[None]:
    """Run a Trainer quietly; Ctrl-C, errors and deaths of workers and of other processes come out as what they are.

    Raises
    ------
    KeyboardInterrupt
        On Ctrl-C.
    TranscriptFormerError
        As it was raised, in this process or in a worker; or if a worker or another process has ended.
    """
    try:
        with quiet_lightning():
            yield
    except SystemExit as error:  # Lightning's answer to Ctrl-C, which would end a notebook's kernel
        if type(error) is SystemExit and trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    except TranscriptFormerError as error:
        # A worker process has put its traceback before the message.
        name = f"{type(error).__name__}: "
        if str(error).startswith("Caught ") and name in str(error):
            raise type(error)(str(error).rpartition(name)[2].strip()) from None
        raise
    except RuntimeError as error:
        if lost := _LOST_WORKER.search(str(error)):
            raise ProcessEndedError(lost_worker(lost[1])) from error
        if isinstance(error, torch.distributed.DistError) or any(backend in str(error) for backend in ("gloo", "NCCL")):
            raise ProcessEndedError(f"another process of this run has ended; see what it said; {RESUME}") from error
        raise


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out what Lightning has to say about hardware it does not use, its other products and its own imports."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [lightning_logger.level for lightning_logger in loggers]
    for lightning_logger in loggers:
        lightning_logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        for lightning_logger, level in zip(loggers, levels, strict=True):
            lightning_logger.setLevel(level)
