"""The model with what a perturbation of cells computes from it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.batches import Batch, group_by_length
from transcriptformer.generation.effects import LABEL_CHANGE, NULL_SHIFT, ONLY_GENE, SHIFT_KEY
from transcriptformer.generation.perturbed_cells import Cells, Changes, changed, plan
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.batch_size import batch_limits
from transcriptformer.runs.module import EncoderModule
from transcriptformer.runs.task import Prediction
from transcriptformer.runtime.memory import Halving
from transcriptformer.storage.results import ROWS


class ShiftModule(EncoderModule):
    """Embeds cells once, and their perturbed copies where the input of the model changes.

    Parameters
    ----------
    checkpoint
        A TranscriptFormer, and its label head, if any.
    requests
        Returns the gene (cells, E) and new count (E,) of each perturbation of cells, given by their rows (cells,).
    n_own
        Number of perturbations that are asked for, which come before those of the null.
    at
        Where absent genes are added: end or start.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        requests: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        n_own: int,
        at: str,
    ) -> None:
        assert isinstance(checkpoint.model, TranscriptFormer)
        super().__init__(checkpoint.model, checkpoint.config.model.inference_config)
        self.checkpoint, self.requests, self.n_own, self.at = checkpoint, requests, n_own, at
        self.label_head, self.limits = checkpoint.label_head, batch_limits(checkpoint)
        advice = "use another device or --precision 16-mixed"
        self.embed_copies = Halving(self._embed, Batch.size, Batch.halves, _join, "perturbed cell", advice)

    def predict(self, batch: Batch) -> Prediction:  # noqa: D102
        genes, counts, rows = (v.cpu().numpy() for v in (batch.gene_tokens, batch.gene_counts, batch.rows))
        cells = Cells(genes, counts, self.model.pad, self.model.config.seq_len)
        known, changes, change_of = plan(cells, *self.requests(rows), self.at)
        effects = self._effects(batch, cells, changes)
        own, null = ((known[:, part], change_of[:, part]) for part in (slice(self.n_own), slice(self.n_own, None)))
        only = torch.from_numpy(np.where(cells.n_genes == 1, genes[:, 0], -1))
        prediction = {ROWS: batch.rows, ONLY_GENE: only.to(batch.rows.device)}
        prediction[SHIFT_KEY] = _of_cells(effects[:, :1], *own)
        if known.shape[1] > self.n_own:
            prediction[NULL_SHIFT] = _of_cells(effects[:, :1], *null)
        if self.label_head is not None:
            prediction[LABEL_CHANGE] = _of_cells(effects[:, 1:], *own)
        return prediction

    def _effects(self, batch: Batch, cells: Cells, changes: Changes) -> Tensor:
        """Return the shift by each change, and the change of each label's probability (K, 1 + labels)."""
        original = self._embed(batch)
        labels, device = self._labels(original), original.device
        n_genes, min_positions = cells.n_genes[changes.cells] + changes.steps, self.checkpoint.min_positions
        effects = original.new_empty(len(n_genes), 1 + labels.shape[1])
        for chosen in group_by_length(n_genes, self.limits, cells.seq_len, min_positions):
            copies = (*changed(cells, changes.take(chosen), min_positions), chosen, changes.cells[chosen])
            genes, counts, indices, of_cell = (torch.from_numpy(values).to(device) for values in copies)
            perturbed = self.embed_copies(Batch(indices, genes, counts, batch.aux_tokens[of_cell]))
            shift = cosine_shift(original[of_cell], perturbed)
            effects[indices] = torch.cat([shift[:, None], self._labels(perturbed) - labels[of_cell]], 1)
        return effects

    def _embed(self, batch: Batch) -> Tensor:
        """Return the embeddings of cells (B, D), float32, as of `inference`."""
        layer = self.inference.embedding_layer_index
        encoded = self.model(batch.gene_tokens, batch.gene_counts, batch.aux_tokens, layer=layer, bias_on_diagonal=True)
        return self.model.cell_embedding(encoded).float()

    def _labels(self, embeddings: Tensor) -> Tensor:
        """Return the probability of each label (B, labels); without a head, there is none."""
        return embeddings[:, :0] if self.label_head is None else self.label_head(embeddings).softmax(1)


def _of_cells(effects: Tensor, known: np.ndarray, change_of: np.ndarray) -> Tensor:
    """Return W effects (K, W) of the changes of each cell (B, E · W), and `known` (B, E) where nothing changes."""
    indices = torch.from_numpy(change_of).to(effects.device)[..., None]
    padded = torch.cat([effects, effects.new_zeros(1, effects.shape[1])])  # which -1 points to
    unchanged = torch.from_numpy(known).to(effects.device)[..., None]
    return torch.where(indices >= 0, padded[indices[..., 0]], unchanged).flatten(1)


def _join(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second])


def cosine_shift(original: Tensor, perturbed: Tensor) -> Tensor:
    """Return 1 − cos of embeddings (B, D) and those after a perturbation (B,); infinite where one is NaN.

    It is half the squared distance of the normalized vectors, because 1 − cos would cancel for small shifts.
    """
    shift = (normalize(original, dim=1) - normalize(perturbed, dim=1)).square().sum(1) / 2
    return shift.nan_to_num(nan=torch.inf, posinf=torch.inf)  # NaN stands for missing
