"""Lightning's Trainer, without what it has to say, and with its ways of failing put plainly."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl

from transcriptformer.errors import TranscriptFormerError

SIGTERM_EXIT_CODE = 143


@contextmanager
def plain_lightning(trainer: pl.Trainer) -> Iterator[None]:
    """Run a Trainer quietly; Ctrl-C, errors of workers and the end of other processes come out as what they are.

    Raises
    ------
    KeyboardInterrupt
        On Ctrl-C.
    TranscriptFormerError
        As it was raised, in this process or in a worker; or if another process has ended.
    """
    try:
        with quiet_lightning():
            yield
    except SystemExit as error:  # Lightning's answer to Ctrl-C, which would end a notebook's kernel
        if trainer.interrupted and error.code != SIGTERM_EXIT_CODE:
            raise KeyboardInterrupt from None
        raise
    except TranscriptFormerError as error:
        # A worker process has put its traceback before the message.
        name = f"{type(error).__name__}: "
        if str(error).startswith("Caught ") and name in str(error):
            raise type(error)(str(error).rpartition(name)[2].strip()) from None
        raise
    except RuntimeError as error:
        if not any(backend in str(error) for backend in ("gloo", "NCCL")):
            raise
        if not trainer.is_global_zero:  # whatever it was, it has been said there
            raise SystemExit(1) from None
        raise TranscriptFormerError(
            "another process of this run has ended; see what it said; the same command with --resume goes on"
        ) from error


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
