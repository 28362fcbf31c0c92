"""Models with what a run computes from them."""

from transcriptformer.config import InferenceConfig
from transcriptformer.data.batches import Batch
from transcriptformer.model.esm2ce import Esm2CE
from transcriptformer.model.label_head import LabelHead
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.module import EncoderModule
from transcriptformer.runs.task import CellModule, Prediction
from transcriptformer.storage.results import LABEL, LABEL_PROBABILITY, N_GENES, ROWS


class TranscriptFormerModule(EncoderModule):
    """TranscriptFormer with the heads needed for `model.inference_config.output_keys`.

    Parameters
    ----------
    clip_counts
        Maximum of observed counts in the likelihood.
    label_head
        Head that predicts labels, if any.
    """

    def __init__(
        self,
        model: TranscriptFormer,
        inference: InferenceConfig,
        clip_counts: float,
        label_head: LabelHead | None = None,
    ) -> None:
        super().__init__(model, inference)
        self.clip_counts, self.label_head = clip_counts, label_head

    def predict(self, batch: Batch) -> Prediction:  # noqa: D102
        encoded = self.model(
            batch.gene_tokens,
            batch.gene_counts,
            batch.aux_tokens,
            layer=self.inference.embedding_layer_index,
            bias_on_diagonal=True,
        )
        prediction = {ROWS: batch.rows}
        if "llh" in self.inference.output_keys:
            prediction["llh"] = self.model.count_nll(encoded, self.clip_counts)
        if "embeddings" not in self.inference.output_keys:
            return prediction
        if self.inference.emb_type == "cge":
            n_genes = (batch.gene_tokens != self.model.pad).sum(1)
            return prediction | {N_GENES: n_genes, "genes": batch.gene_tokens, "cge_embeddings": encoded.hidden}
        embeddings = self.model.cell_embedding(encoded)
        if self.label_head is not None:
            best = self.label_head(embeddings).softmax(1).max(1)
            prediction |= {LABEL: best.indices, LABEL_PROBABILITY: best.values}
        return prediction | {"embeddings": embeddings}


class Esm2CEModule(CellModule):
    """The ESM2-CE baseline, without a transformer."""

    def __init__(self, model: Esm2CE, inference: InferenceConfig, pad: int) -> None:
        super().__init__()
        self.model, self.inference, self.pad = model, inference, pad

    def predict(self, batch: Batch) -> Prediction:  # noqa: D102
        if self.inference.emb_type == "cell":
            return {ROWS: batch.rows, "embeddings": self.model.cell_embedding(batch.gene_tokens)}
        genes = batch.gene_tokens
        n_genes, embeddings = (genes != self.pad).sum(1), self.model.gene_embedding(genes)
        return {ROWS: batch.rows, N_GENES: n_genes, "genes": genes, "cge_embeddings": embeddings}
