"""Training: `fit(load_train_config(options))` trains a model and writes a checkpoint."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transcriptformer.training.config import load_train_config
    from transcriptformer.training.run import fit

__all__ = ["fit", "load_train_config"]


def __getattr__(name: str) -> Any:
    if name == "fit":  # imports PyTorch, which is not needed to validate settings
        return import_module("transcriptformer.training.run").fit
    if name == "load_train_config":
        return import_module("transcriptformer.training.config").load_train_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
