"""Run Lightning's Trainer quietly and translate its errors."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch

from transcriptformer.errors import TranscriptFormerError
from transcriptformer.runtime.parents import lost_worker_message
from transcriptformer.runtime.signals import RESUME
from transcriptformer.runtime.watchdog import ProcessEndedError

_LOST_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:exited unexpectedly|is killed)")
"""PyTorch's messages about dead data workers."""

_TEARDOWN_FAILED = "Please call `iter(combined_loader)` first"
"""Lightning's message if an epoch is interrupted before its first batch."""


@contextmanager
def plain_lightning(trainer: pl.Trainer) -> Iterator[None]:
    """Run a Trainer quietly and restore the errors that Lightning and PyTorch wrap.

    Raises
    ------
    KeyboardInterrupt
        On Ctrl-C.
    TranscriptFormerError
        If this process or a worker raised it, or if a worker or another process has ended.
    """
    try:
        with quiet_lightning():
            yield
    except BaseException as raised:
        error = _before_teardown(raised)
        if type(error) is SystemExit and trainer.interrupted:  # Ctrl-C, which would end a notebook's kernel
            raise KeyboardInterrupt from None
        if isinstance(error, TranscriptFormerError):
            # Drop the worker's traceback, which precedes the message.
            name = f"{type(error).__name__}: "
            if str(error).startswith("Caught ") and name in str(error):
                raise type(error)(str(error).rpartition(name)[2].strip()) from None
        elif isinstance(error, RuntimeError):
            if lost := _LOST_WORKER.search(str(error)):
                raise ProcessEndedError(lost_worker_message(lost[1])) from error
            is_connection = any(backend in str(error) for backend in ("gloo", "NCCL"))
            if is_connection or isinstance(error, torch.distributed.DistError):
                raise ProcessEndedError(f"another process of this run has ended; see its output; {RESUME}") from error
        if error is raised:
            raise
        raise error from error.__cause__  # not from the error that hid it


def _before_teardown(error: BaseException) -> BaseException:
    """Return the error that ended the Trainer, which a failed teardown may hide."""
    while _TEARDOWN_FAILED in str(error) and error.__context__ is not None:
        error = error.__context__
    return error


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's messages about unused hardware, its other products and its own imports."""
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
