"""Training step, validation and optimizer, as a LightningModule."""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from transcriptformer.data.batches import Batch
from transcriptformer.errors import TrainingError
from transcriptformer.model.attention.choose import choose_attention
from transcriptformer.model.label_head import NO_LABEL, LabelHead
from transcriptformer.model.layers import Linear
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runtime.device import compute_dtype
from transcriptformer.training.config import TrainConfig

logger = logging.getLogger(__name__)


class Sums(NamedTuple):
    """Losses summed over cells, and their denominators.

    Attributes
    ----------
    gene_nll, count_nll
        Sums over genes.
    label_loss
        Sum over labeled cells.
    n_genes, n_labels, n_correct
        Number of genes, of labeled cells, and of correctly predicted labels.
    """

    gene_nll: Tensor
    count_nll: Tensor
    label_loss: Tensor
    n_genes: Tensor
    n_labels: Tensor
    n_correct: Tensor

    @classmethod
    def total(cls, *sums: Self) -> Self:
        """Add several together."""
        return cls(*(torch.stack(values).sum(0) for values in zip(*sums, strict=True)))


@dataclass(frozen=True)
class Weights:
    """Weights of the losses; a loss with weight 0 is not computed."""

    gene: float
    count: float
    label: float

    def loss(self, sums: Sums) -> Tensor:
        """Return the weighted sum of the means over genes and over labeled cells."""
        total = sums.gene_nll.new_zeros(())
        if self.gene or self.count:
            total = total + (self.gene * sums.gene_nll + self.count * sums.count_nll) / sums.n_genes
        if self.label:
            total = total + self.label * sums.label_loss / sums.n_labels.clamp(min=1)
        return total


class TrainingModule(pl.LightningModule):
    """Trains a model and, optionally, a label head.

    Every gene has the same weight, and so has every labeled cell: the losses of a step are divided by their number in
    all batches of all processes.

    Parameters
    ----------
    model
        Model in training mode; parameters that do not require gradients are frozen.
    label_head
        Label head, or None if no labels are learned.
    config
        Settings of the run.
    """

    def __init__(self, model: TranscriptFormer, label_head: LabelHead | None, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.label_head = model, label_head
        self.config, self.weights = config, Weights(config.gene_loss_weight, *config.other_loss_weights)
        self.automatic_optimization = False
        self.strict_loading = False  # frozen parameters are not saved
        self.n_steps = self.steps_per_epoch = 1
        self.gradient_norm = torch.zeros(())
        self.labels: dict[str, np.ndarray] = {}
        self.describe: Callable[[np.ndarray], str] = str
        self.validated: list[Sums] = []

    def configure(
        self,
        n_steps: int,
        steps_per_epoch: int,
        labels: Mapping[str, np.ndarray],
        describe: Callable[[np.ndarray], str],
    ) -> None:
        """Set what is known once the cells have been read.

        Parameters
        ----------
        n_steps, steps_per_epoch
            Number of steps in total, and in the first epoch.
        labels
            Arrays (cells,) under `training` and `validation`, indexed by the rows of a batch; `NO_LABEL`: unlabeled.
        describe
            Formats rows of training cells for error messages.
        """
        self.n_steps, self.steps_per_epoch = n_steps, steps_per_epoch
        self.labels, self.describe = dict(labels), describe

    def on_fit_start(self) -> None:  # noqa: D102
        training, config = self.config.training, self.config.model.model_config
        dtype = compute_dtype(training.precision, self.device)
        self.model.transformer_encoder.attention = choose_attention(training.attention, self.device, dtype, config)

    def training_step(self, step: list[Batch], batch_idx: int) -> None:
        """Accumulate the gradients of all batches of a step, then update the weights."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        assert isinstance(schedule, LambdaLR)
        self._seed_dropout()
        learning_rate = schedule.get_last_lr()[0]
        n_genes, n_labels = self._reduce(torch.stack([self._denominators(batch) for batch in step]).sum(0))
        sums = []
        for i, batch in enumerate(step, start=1):
            of_batch = self.losses(batch, "training")
            share = of_batch._replace(n_genes=n_genes, n_labels=n_labels)
            with self._gradient_sync(i == len(step)):
                self.manual_backward(self.weights.loss(share) * self.trainer.world_size)  # DDP averages gradients
            sums.append(Sums(*(value.detach() for value in of_batch)))
        self._check_finite(sums, step)
        total = self._reduce_sums(Sums.total(*sums))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step_metrics = {"learning_rate": learning_rate, "gradient_norm": self.gradient_norm, "genes": n_genes.float()}
        self.log_dict({**self._metrics(total, ""), **step_metrics, **self._progress()})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients, which Lightning has already unscaled.

        Raises
        ------
        TrainingError
            If they are not finite, on all processes; in float16, such a step is skipped instead.
        """
        max_norm = self.config.training.clip_gradients or math.inf
        self.gradient_norm = nn.utils.clip_grad_norm_([p for p in self.parameters() if p.requires_grad], max_norm)
        is_scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if not is_scaled and not bool(self.gradient_norm.isfinite()):
            raise TrainingError(
                f"step {self.global_step + 1}: the gradients are not finite; check the counts, or lower "
                "training.learning_rate; earlier saved states are kept"
            )

    def losses(self, batch: Batch, kind: str) -> Sums:
        """Sum the losses over the genes and labeled cells of a batch; a loss with weight 0 is 0."""
        zero = torch.zeros((), device=batch.gene_tokens.device)
        is_gene = batch.gene_tokens != self.model.pad
        n_genes = is_gene.sum(1)  # (B,)
        gene_nll = count_nll = label_loss = n_correct = zero
        if self.weights.gene or self.weights.count:
            encoded = self.model(batch.gene_tokens, batch.gene_counts, batch.aux_tokens)
            if self.weights.gene:
                gene_nll = _sum_of_means(self.model.gene_nll(encoded), n_genes)
            if self.weights.count:
                clip_counts = self.config.model.data_config.clip_counts
                count_nll = _sum_of_means(self.model.count_nll(encoded, clip_counts), n_genes)
        n_labels = zero
        if self.label_head is not None and self.weights.label:
            label = torch.from_numpy(self.labels[kind][batch.rows.cpu().numpy()]).to(batch.rows.device)  # (B,)
            encoded = self.model(batch.gene_tokens, batch.gene_counts, batch.aux_tokens, bias_on_diagonal=True)
            logits = self.label_head(self.model.cell_embedding(encoded))  # (B, labels)
            label_loss = F.cross_entropy(logits, label, ignore_index=NO_LABEL, reduction="sum")
            n_labels, n_correct = (label != NO_LABEL).sum(), (logits.argmax(1) == label).sum()
        return Sums(gene_nll, count_nll, label_loss, n_genes.sum(), n_labels, n_correct)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Compute the losses of a batch."""
        self.validated.append(self.losses(batch, "validation"))

    def on_validation_epoch_end(self) -> None:
        """Log the losses over all validation cells."""
        zero = Sums(*torch.zeros(len(Sums._fields), device=self.device))
        total = self._reduce_sums(Sums.total(zero, *self.validated))
        self.validated = []
        if not bool(self.weights.loss(total).isfinite()):
            raise TrainingError(
                f"step {self.global_step}: the validation loss is not finite; lower training.learning_rate"
            )
        self.log_dict({**self._metrics(total, "validation_"), **self._progress()})

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and cosine decay; weight decay applies to the matrices of linear layers only."""
        training = self.config.training
        decayed = [p for p in self._matrices() if p.requires_grad]
        ids = {id(p) for p in decayed}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in ids]
        groups = [
            {"params": decayed, "weight_decay": training.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        first, second = training.betas
        optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(first, second))
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, self._learning_rate_factor)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop frozen weights, which are loaded from the checkpoint or the files the run starts from."""
        learned = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in learned}

    def _learning_rate_factor(self, step: int) -> float:
        training = self.config.training
        n_warmup = math.ceil(training.warmup_share * self.n_steps)
        if step < n_warmup:
            return (step + 1) / n_warmup
        progress = (step - n_warmup) / max(1, self.n_steps - n_warmup)
        final = training.final_learning_rate_share
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def _matrices(self) -> list[nn.Parameter]:
        linear = [module for module in self.modules() if isinstance(module, Linear)]
        return [p for module in linear for p in module.parameters(recurse=False) if p.ndim == 2]

    def _denominators(self, batch: Batch) -> Tensor:
        """Count the genes and labeled cells of a batch (2,)."""
        n_genes = (batch.gene_tokens != self.model.pad).sum()
        n_labels = (self.labels["training"][batch.rows.cpu().numpy()] != NO_LABEL).sum() if self.weights.label else 0
        return torch.stack([n_genes, n_genes.new_tensor(n_labels)])

    def _progress(self) -> dict[str, float]:
        """Return the step, which Lightning uses for logged values, and the fractional epoch."""
        return {"step": float(self.global_step), "epoch": self.global_step / self.steps_per_epoch}

    def _seed_dropout(self) -> None:
        """Seed by step and process, so that a resumed run draws the same dropout masks."""
        place = [self.config.training.seed, self.global_step, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1))

    def _gradient_sync(self, is_last: bool) -> AbstractContextManager[None]:
        """Synchronize gradients once per step, because processes may have different numbers of batches."""
        model = self.trainer.strategy.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext()

    def _reduce(self, values: Tensor, operation: str = "sum") -> Tensor:
        return self.trainer.strategy.reduce(values, reduce_op=operation)

    def _reduce_sums(self, sums: Sums) -> Sums:
        return Sums(*self._reduce(torch.stack([value.float() for value in sums])))

    def _check_finite(self, sums: list[Sums], step: list[Batch]) -> None:
        """Raise TrainingError on all processes if any loss is not finite, before the weights are updated."""
        is_bad = (~torch.stack([self.weights.loss(of_batch) for of_batch in sums]).isfinite()).tolist()
        own_rank = self.global_rank if any(is_bad) else self.trainer.world_size
        failed_rank = int(self._reduce(torch.tensor(own_rank, device=self.device), "min"))
        if failed_rank == self.trainer.world_size:
            return
        rows = [batch.rows.cpu().numpy() for batch, bad in zip(step, is_bad, strict=True) if bad]
        cells = self.describe(np.concatenate(rows)) if rows else ""
        cells = self.trainer.strategy.broadcast(cells, src=failed_rank)
        raise TrainingError(
            f"step {self.global_step + 1}: the loss is not finite in a batch of {cells}; check the counts, or lower "
            "training.learning_rate; earlier saved states are kept"
        )

    def _metrics(self, sums: Sums, prefix: str) -> dict[str, Tensor]:
        metrics = {"loss": self.weights.loss(sums)}
        if self.weights.gene:
            metrics["gene_nll"] = sums.gene_nll / sums.n_genes
        if self.weights.count:
            metrics["count_nll"] = sums.count_nll / sums.n_genes
        if self.weights.label:
            n_labels = sums.n_labels.clamp(min=1)
            metrics |= {"label_loss": sums.label_loss / n_labels, "label_accuracy": sums.n_correct / n_labels}
        return {prefix + name: value for name, value in metrics.items()}


def _sum_of_means(means: Tensor, n: Tensor) -> Tensor:
    """Sum losses that are averages over the `n` genes of each cell (B,)."""
    return (means * n).sum()
