"""A head that predicts a label, such as the cell type, from a cell embedding."""

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from transcriptformer.model.layers import LayerNorm, Linear

NO_LABEL = -1
"""Index of the label of unlabeled cells."""


class LabelHead(nn.Module):
    """Layer norm and a linear layer.

    The norm is needed because embeddings are sums over genes, whose scale depends on the number of genes.

    Parameters
    ----------
    column
        Column of `obs` with the labels.
    labels
        Values of that column, in the order of the logits.
    embed_dim
        Embedding width, D.
    """

    def __init__(self, column: str, labels: Sequence[str], embed_dim: int) -> None:
        super().__init__()
        self.column, self.labels = column, tuple(labels)
        self.norm = LayerNorm(embed_dim)
        self.linear = Linear(embed_dim, len(self.labels))

    def forward(self, cell_embedding: Tensor) -> Tensor:
        """Compute logits (B, labels), float32, from cell embeddings (B, D)."""
        return self.linear(self.norm(cell_embedding)).float()

    def to_file(self) -> dict[str, Any]:
        """Return the content of `label_head.pt`: tensors and text."""
        weights = {name: weight.detach().cpu().float() for name, weight in self.state_dict().items()}
        return {"column": self.column, "labels": list(self.labels), "weights": weights}

    @classmethod
    def from_file(cls, content: Any) -> Self:
        """Build a head from the content of `label_head.pt`.

        Raises
        ------
        KeyError, TypeError, ValueError, RuntimeError
            If the content is invalid.
        """
        column, labels, weights = content["column"], content["labels"], content["weights"]
        if not all(isinstance(name, str) for name in (column, *labels)) or len(set(labels)) < len(labels):
            raise ValueError("the column or a label is not text, or labels are not unique")
        if not column or "/" in column:
            raise ValueError(f"{column!r} is not a valid column name")
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError("weights are NaN or infinite")
        head = cls(column, labels, len(weights["norm.weight"]))
        head.load_state_dict(weights)
        return head
