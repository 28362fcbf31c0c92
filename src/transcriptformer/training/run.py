"""Train a model on cells and write a checkpoint."""

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger

from transcriptformer.checkpoint.load import LABEL_HEAD, WEIGHTS
from transcriptformer.checkpoint.write import write_checkpoint
from transcriptformer.data.fingerprint import identify, identify_file
from transcriptformer.errors import TrainingError
from transcriptformer.model.lora import merged_state_dict
from transcriptformer.runtime.device import choose_device, compute_dtype
from transcriptformer.runtime.memory import is_out_of_memory, keep_freed_memory
from transcriptformer.runtime.processes import plan_processes
from transcriptformer.runtime.signals import report_kept
from transcriptformer.runtime.trainer import plain_lightning, quiet_lightning, trainer_options
from transcriptformer.storage.workspace import flatten
from transcriptformer.training.baseline import Baseline, start_from_frequencies
from transcriptformer.training.batch_size import training_limits
from transcriptformer.training.callbacks import OnStep, Saving
from transcriptformer.training.config import TrainConfig
from transcriptformer.training.corpus import Corpus
from transcriptformer.training.data_module import TrainingData, count_streams
from transcriptformer.training.folder import AtomicCheckpointIO, TrainingFolder
from transcriptformer.training.metrics import MetricsFile, plot_losses, read_metrics
from transcriptformer.training.module import TrainingModule, Weights
from transcriptformer.training.start import StartingPoint, count_parameters, prepare, read_gene_vocab

logger = logging.getLogger(__name__)

LIGHTNING_PRECISION: dict[torch.dtype, Any] = {
    torch.float32: "32-true",
    torch.bfloat16: "bf16-mixed",
    torch.float16: "16-mixed",
}

_MAY_CHANGE_ON_RESUME = {
    "model.data_config.n_data_workers",
    "model.data_config.allow_external_links",
    "model.data_config.gene_map",
    *(
        f"training.{name}"
        for name in (
            *("output_path", "resume", "device", "num_gpus", "num_nodes", "attention", "tokens_per_batch"),
            *("save_every", "log_every", "patience", "data_files", "validation_files"),
            *("protein_embeddings", "checkpoint_path"),
        )
    ),
}
"""Settings that do not affect the result, and may change when resuming. (Files are compared by content.)"""


class Trained(NamedTuple):
    """The outcome of a training run.

    Attributes
    ----------
    checkpoint
        Folder in the published layout.
    n_steps
        Step of the weights in the checkpoint.
    validation
        Validation metrics at that step, by name; empty without validation.
    baseline
        Validation loss of the frequency baseline, weighted like the model's; None without validation.
    baseline_parts
        The two losses of the baseline; None without validation.
    """

    checkpoint: Path
    n_steps: int
    validation: dict[str, float]
    baseline: float | None
    baseline_parts: Baseline | None

    def describe(self) -> str:
        """Summarize the outcome in a few lines."""
        lines = [f"{self.checkpoint}: weights of step {self.n_steps}"]
        if self.validation:
            lines.append(f"validation loss {_format_losses(self.validation, 'validation_')}")
        if self.baseline is not None and self.baseline_parts is not None:
            losses = {"loss": self.baseline, **self.baseline_parts._asdict()}
            lines.append(f"frequency baseline {_format_losses(losses, '')}")
        if "validation_label_accuracy" in self.validation:
            lines.append(f"label accuracy {100 * self.validation['validation_label_accuracy']:.1f} %")
        return "\n".join(lines)


def _format_losses(metrics: Mapping[str, float], prefix: str) -> str:
    """Format a loss and its parts."""
    names = (("gene_nll", "genes"), ("count_nll", "counts"), ("label_loss", "labels"))
    parts = [f"{word} {metrics[prefix + name]:.3f}" for name, word in names if prefix + name in metrics]
    return f"{metrics[prefix + 'loss']:.3f} ({', '.join(parts)})"


def fit(config: TrainConfig, on_step: OnStep | None = None) -> Trained | None:
    """Train a model and write a checkpoint, in one or several processes.

    Returns
    -------
    The outcome, or None in processes other than the first.

    Raises
    ------
    TranscriptFormerError
        If a file, the checkpoint to start from or a setting is invalid, a loss is not finite, or the disk is full. The
        last saved state is kept, and `resume` continues from it.
    """
    training = config.training
    device = choose_device(training.device)
    if device.type == "cpu":
        keep_freed_memory()
    processes = plan_processes(training, device)
    folder = TrainingFolder(Path(training.output_path))
    watchdog = processes.watchdog()
    saving = Saving(folder, training, MetricsFile(folder.metrics), watchdog, on_step)
    options = trainer_options(processes, watchdog, backend="nccl" if device.type == "cuda" else "gloo")
    trainer = _trainer(config, device, options, folder, saving)
    if not trainer.is_global_zero:  # all processes would log the same
        logging.getLogger("transcriptformer").setLevel(logging.ERROR)
    with watchdog, closing(Corpus(training, config.model.data_config, read_gene_vocab(config))) as corpus:
        try:
            start = prepare(config, corpus)
            n_trainable, n_weights = count_parameters(start.model, start.label_head)
            logger.info("%s of %s weights are trainable", f"{n_trainable:,}", f"{n_weights:,}")
            if n_trainable == 0:
                raise TrainingError("training.freeze: all weights are frozen; freeze fewer modules")
            module = TrainingModule(start.model, start.label_head, config)
            identity = _identify(config, corpus, count_streams(config, processes.total))
            yaml = OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
            begin = partial(folder.begin, identity, yaml, training.resume)
            if trainer.is_global_zero:
                folder.lock()
            if training.resume and folder.is_complete:
                if trainer.is_global_zero:
                    begin()
                logger.info("%s is already complete", folder.path)
            else:
                protein_dim = start.model.gene_embeddings.embedding.embedding_dim
                limits = training_limits(config, device, protein_dim, n_trainable, n_weights, processes.per_node)
                readers = corpus.readers(start.gene_vocab, start.aux_vocabs, config.model.model_config.seq_len)
                pad, n_tokens, on_ready = (
                    start.gene_vocab.pad,
                    len(start.gene_vocab),
                    _OnReady(start, config, module, saving),
                )
                data = TrainingData(
                    corpus, readers, config, limits, pad, n_tokens, folder, processes.total, begin, on_ready
                )
                watchdog.watch_children(processes.launch())
                _run(trainer, module, data, folder.last if training.resume and folder.last.is_file() else None)
            if not trainer.is_global_zero:
                return None
            if not folder.is_complete and _identify(config, corpus, count_streams(config, processes.total)) != identity:
                raise TrainingError(
                    f"{folder.path}: a file that the run reads has changed since its start; restore it, then rerun the "
                    "same command with --resume to write the checkpoint"
                )
            return _finish(config, folder, start, module)
        except BaseException as error:
            if trainer.is_global_zero:
                report_kept(error, saving.describe_kept())
            raise
        finally:
            if trainer.is_global_zero:
                folder.unlock()


def _trainer(
    config: TrainConfig,
    device: torch.device,
    options: Mapping[str, Any],
    folder: TrainingFolder,
    saving: Saving,
) -> pl.Trainer:
    training = config.training
    has_tensorboard = find_spec("tensorboard") is not None
    with quiet_lightning():
        return pl.Trainer(
            accelerator=device.type,
            **{**options, "plugins": [*options.get("plugins", []), AtomicCheckpointIO()]},
            precision=LIGHTNING_PRECISION[compute_dtype(training.precision, device)],
            max_epochs=-1,
            limit_val_batches=None if training.has_validation else 0,
            callbacks=[saving],
            logger=TensorBoardLogger(folder.path, name="tensorboard", version="") if has_tensorboard else False,
            log_every_n_steps=training.log_every,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


class _OnReady:
    """Configures the model, the module and the callback once cells and steps are known."""

    def __init__(self, start: StartingPoint, config: TrainConfig, module: TrainingModule, saving: Saving) -> None:
        self.start, self.config, self.module, self.saving = start, config, module, saving

    def __call__(self, data: TrainingData) -> None:
        split, labels = data.split, self.start.labels
        of_rows = {"training": labels, "validation": labels[split.is_validation]} if len(labels) else {}
        self.module.configure(data.n_steps, data.epochs.n_steps(0), of_rows, split.describe)
        self.saving.configure(data.n_steps, data.validate_every)
        training = self.config.training
        if training.checkpoint_path is None and training.start_from_frequencies:
            start_from_frequencies(self.start.model, data.statistics)
        logger.info(
            "%d training and %d validation cells; %d steps, %d per epoch",
            *(split.is_training.sum(), split.is_validation.sum(), data.n_steps, data.epochs.n_steps(0)),
        )


def _run(trainer: pl.Trainer, module: TrainingModule, data: TrainingData, state: Path | None) -> None:
    try:
        with plain_lightning(trainer):
            trainer.fit(module, datamodule=data, ckpt_path=state)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"out of memory: lower training.tokens_per_batch (now {data.limits.max_tokens})") from error


def _finish(config: TrainConfig, folder: TrainingFolder, start: StartingPoint, module: TrainingModule) -> Trained:
    """Write the checkpoint with the weights of the best validation, and the plot of the losses."""
    state = AtomicCheckpointIO().load_checkpoint(folder.best)
    weights = Weights(config.gene_loss_weight, *config.other_loss_weights)
    baseline = Baseline.load(folder.baseline) if config.training.has_validation else None
    loss = weights.gene * baseline.gene_nll + weights.count * baseline.count_nll if baseline else None
    if not folder.is_complete:
        module.load_state_dict(state["state_dict"], strict=False)  # frozen weights are not saved
        merged = merged_state_dict(start.model)
        write_checkpoint(folder.checkpoint, config.model, start.gene_files, start.aux_vocabs, merged, start.label_head)
    if not folder.plot.exists():
        plot_losses(folder.metrics, folder.plot, loss if weights.label == 0 else None)
    step = int(state["global_step"])
    rows = [row for row in read_metrics(folder.metrics) if int(row["step"]) == step and row["validation_loss"]]
    validation = (
        {name: float(value) for name, value in rows[-1].items() if name.startswith("validation_") and value}
        if rows
        else {}
    )
    return Trained(folder.checkpoint, step, validation, loss, baseline)


def _identify(config: TrainConfig, corpus: Corpus, n_streams: int) -> dict[str, Any]:
    """Return everything that determines the result of a run: settings, files, starting point, order of the cells."""
    training = config.training
    start = [Path(file) for file in training.protein_embeddings]
    if training.checkpoint_path is not None:
        folder = Path(training.checkpoint_path)
        data = config.model.data_config
        vocabularies = [*data.esm2_mappings, *(f"{column}_vocab.json" for column in data.aux_cols)]
        start += [folder / WEIGHTS, *folder.glob(LABEL_HEAD), *(folder / "vocabs" / v for v in vocabularies)]
    return {
        "settings": {
            **{key: value for key, value in flatten(asdict(config)) if key not in _MAY_CHANGE_ON_RESUME},
            "type of matrix products": str(compute_dtype(training.precision, choose_device(training.device))),
        },
        "streams": n_streams,
        "cells": [{**identify(source.name), "counts and genes": source.identify()} for source in corpus.sources],
        "start": [identify_file(file) for file in start],
    }
