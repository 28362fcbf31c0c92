"""Training steps, validation and the optimizer, as a LightningModule."""

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
from transcriptformer.model.attention.flex import choose_training_attention
from transcriptformer.model.label_head import NO_LABEL, LabelHead
from transcriptformer.model.layers import Linear
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runtime.device import compute_dtype
from transcriptformer.training.config import TrainConfig

logger = logging.getLogger(__name__)


class Sums(NamedTuple):
    """Losses added up over cells, and what to divide them by.

    Attributes
    ----------
    gene_nll, count_nll
        Over genes.
    label_loss
        Over cells with a label.
    n_genes, n_labels, n_right
        Genes, cells with a label, and those of them whose label is told right.
    """

    gene_nll: Tensor
    count_nll: Tensor
    label_loss: Tensor
    n_genes: Tensor
    n_labels: Tensor
    n_right: Tensor

    @classmethod
    def of(cls, *sums: Self) -> Self:
        """The sum of several."""
        return cls(*(torch.stack(values).sum(0) for values in zip(*sums, strict=True)))


@dataclass(frozen=True)
class Weights:
    """What each loss counts for; one that counts nothing is not computed."""

    gene: float
    count: float
    label: float

    def loss(self, sums: Sums) -> Tensor:
        """The means over genes and over cells with a label, weighted and added."""
        total = sums.gene_nll.new_zeros(())
        if self.gene or self.count:
            total = total + (self.gene * sums.gene_nll + self.count * sums.count_nll) / sums.n_genes
        if self.label:
            total = total + self.label * sums.label_loss / sums.n_labels.clamp(min=1)
        return total


class TrainingModule(pl.LightningModule):
    """A model that learns.

    Every gene counts the same, and every cell with a label does: a step divides by how many there are in all of its
    batches, on all processes.

    Parameters
    ----------
    model
        In training mode; parameters that do not require gradients stay as they are.
    label_head
        For labels, if they are to be learned.
    config
        How to train.
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

    def expect(
        self,
        n_steps: int,
        steps_per_epoch: int,
        labels: Mapping[str, np.ndarray],
        describe: Callable[[np.ndarray], str],
    ) -> None:
        """Say how many steps there will be, the labels of training and validation cells, and how to name the former.

        Parameters
        ----------
        n_steps, steps_per_epoch
            In all, and in the first epoch.
        labels
            By `training` and `validation`, an array (cells,) to be looked into by a batch's rows; `NO_LABEL`: none.
        describe
            Rows of training cells, in words.
        """
        self.n_steps, self.steps_per_epoch = n_steps, steps_per_epoch
        self.labels, self.describe = dict(labels), describe

    def on_fit_start(self) -> None:  # noqa: D102
        training, config = self.config.training, self.config.model.model_config
        dtype = compute_dtype(training.precision, self.device)
        self.model.transformer_encoder.attention = choose_training_attention(
            training.attention, self.device, dtype, config
        )

    def training_step(self, step: list[Batch], batch_idx: int) -> None:
        """One step of the optimizer, batch by batch."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        assert isinstance(schedule, LambdaLR)
        self._seed_dropout()
        learning_rate = schedule.get_last_lr()[0]
        n_genes, n_labels = self._over_processes(torch.stack([self._denominators(batch) for batch in step]).sum(0))
        sums = []
        for i, batch in enumerate(step, start=1):
            of_batch = self.losses(batch, "training")
            share = of_batch._replace(n_genes=n_genes, n_labels=n_labels)
            with self._exchanging_gradients(i == len(step)):
                self.manual_backward(self.weights.loss(share) * self.trainer.world_size)  # DDP averages gradients
            sums.append(Sums(*(value.detach() for value in of_batch)))
        self._check(sums, step)
        total = self._reduced(Sums.of(*sums))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        how = {"learning_rate": learning_rate, "gradient_norm": self.gradient_norm, "genes": n_genes.float()}
        self.log_dict({**self._named(total, ""), **how, **self._place()})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Limit the norm of the gradients, which are free of the factor that fp16 needs by now."""
        most = self.config.training.clip_gradients or math.inf
        self.gradient_norm = nn.utils.clip_grad_norm_([p for p in self.parameters() if p.requires_grad], most)

    def losses(self, batch: Batch, kind: str) -> Sums:
        """Losses over a batch's genes and its cells with a label, with gradients; 0 where one counts nothing."""
        zero = torch.zeros((), device=batch.gene_tokens.device)
        is_gene = batch.gene_tokens != self.model.pad
        n_genes = is_gene.sum(1)  # (B,)
        gene_nll = count_nll = label_loss = n_right = zero
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
            n_labels, n_right = (label != NO_LABEL).sum(), (logits.argmax(1) == label).sum()
        return Sums(gene_nll, count_nll, label_loss, n_genes.sum(), n_labels, n_right)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the losses of a batch."""
        self.validated.append(self.losses(batch, "validation"))

    def on_validation_epoch_end(self) -> None:
        """Log the losses over all validation cells."""
        nothing = Sums(*torch.zeros(len(Sums._fields), device=self.device))
        total = self._reduced(Sums.of(nothing, *self.validated))
        self.validated = []
        if not bool(self.weights.loss(total).isfinite()):
            raise TrainingError(
                f"step {self.global_step}: the validation loss is not a number; lower the learning rate"
            )
        self.log_dict({**self._named(total, "validation_"), **self._place()})

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and a cosine; weight decay only for the matrices of linear layers."""
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
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, self._share_of_learning_rate)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen: it is where it came from."""
        learned = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in learned}

    def _share_of_learning_rate(self, step: int) -> float:
        training = self.config.training
        n_warmup = math.ceil(training.warmup_share * self.n_steps)
        if step < n_warmup:
            return (step + 1) / n_warmup
        way = (step - n_warmup) / max(1, self.n_steps - n_warmup)
        final = training.final_learning_rate_share
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, way)))

    def _matrices(self) -> list[nn.Parameter]:
        linear = [module for module in self.modules() if isinstance(module, Linear)]
        return [p for module in linear for p in module.parameters(recurse=False) if p.ndim == 2]

    def _denominators(self, batch: Batch) -> Tensor:
        """Genes and cells with a label in a batch (2,)."""
        n_genes = (batch.gene_tokens != self.model.pad).sum()
        n_labels = (self.labels["training"][batch.rows.cpu().numpy()] != NO_LABEL).sum() if self.weights.label else 0
        return torch.stack([n_genes, n_genes.new_tensor(n_labels)])

    def _place(self) -> dict[str, float]:
        """What Lightning takes for the step of logged values, and passes over the cells."""
        return {"step": float(self.global_step), "epoch": self.global_step / self.steps_per_epoch}

    def _seed_dropout(self) -> None:
        """By step and process, so that a run that was resumed goes on in the same way."""
        place = [self.config.training.seed, self.global_step, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1))

    def _exchanging_gradients(self, is_last: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients once in a step, for the numbers of their batches may differ."""
        model = self.trainer.strategy.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext()

    def _over_processes(self, values: Tensor, operation: str = "sum") -> Tensor:
        return self.trainer.strategy.reduce(values, reduce_op=operation)

    def _reduced(self, sums: Sums) -> Sums:
        return Sums(*self._over_processes(torch.stack([value.float() for value in sums])))

    def _check(self, sums: list[Sums], step: list[Batch]) -> None:
        """Stop, on all processes alike, where a loss is not a number, before the weights take harm."""
        is_bad = (~torch.stack([self.weights.loss(of_batch) for of_batch in sums]).isfinite()).tolist()
        mine = self.global_rank if any(is_bad) else self.trainer.world_size
        culprit = int(self._over_processes(torch.tensor(mine, device=self.device), "min"))
        if culprit == self.trainer.world_size:
            return
        rows = [batch.rows.cpu().numpy() for batch, bad in zip(step, is_bad, strict=True) if bad]
        cells = self.describe(np.concatenate(rows)) if rows else ""
        cells = self.trainer.strategy.broadcast(cells, src=culprit)
        raise TrainingError(
            f"step {self.global_step + 1}: the loss is not a number, in a batch of {cells}; what was saved before it "
            "stays; see whether counts are what they should be, or lower training.learning_rate"
        )

    def _named(self, sums: Sums, prefix: str) -> dict[str, Tensor]:
        named = {"loss": self.weights.loss(sums)}
        if self.weights.gene:
            named["gene_nll"] = sums.gene_nll / sums.n_genes
        if self.weights.count:
            named["count_nll"] = sums.count_nll / sums.n_genes
        if self.weights.label:
            n_labels = sums.n_labels.clamp(min=1)
            named |= {"label_loss": sums.label_loss / n_labels, "label_accuracy": sums.n_right / n_labels}
        return {prefix + name: value for name, value in named.items()}


def _sum_of_means(means: Tensor, n: Tensor) -> Tensor:
    """The sum of what has been averaged per cell over `n` genes (B,)."""
    return (means * n).sum()
