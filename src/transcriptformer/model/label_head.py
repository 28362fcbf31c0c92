"""A head that tells a cell's label, such as its type, from its embedding."""

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from transcriptformer.model.layers import LayerNorm, Linear

NO_LABEL = -1
"""Stands for the label of a cell that has none."""


class LabelHead(nn.Module):
    """Layer norm and one linear layer: embeddings are sums over genes, whose scale says little.

    Parameters
    ----------
    column
        Column of `obs` with the labels.
    labels
        Its values, in the order of the logits.
    embed_dim
        Width of an embedding, D.
    """

    def __init__(self, column: str, labels: Sequence[str], embed_dim: int) -> None:
        super().__init__()
        self.column, self.labels = column, tuple(labels)
        self.norm = LayerNorm(embed_dim)
        self.linear = Linear(embed_dim, len(self.labels))

    def forward(self, cell_embedding: Tensor) -> Tensor:
        """Logits (B, labels), float32, from cell embeddings (B, D)."""
        return self.linear(self.norm(cell_embedding)).float()

    def to_file(self) -> dict[str, Any]:
        """What `label_head.pt` holds: tensors and text."""
        weights = {name: weight.detach().cpu().float() for name, weight in self.state_dict().items()}
        return {"column": self.column, "labels": list(self.labels), "weights": weights}

    @classmethod
    def from_file(cls, content: Any) -> Self:
        """The head that `to_file` described.

        Raises
        ------
        KeyError, TypeError, ValueError, RuntimeError
            If it is something else.
        """
        column, labels, weights = content["column"], content["labels"], content["weights"]
        if not all(isinstance(name, str) for name in (column, *labels)) or len(set(labels)) < len(labels):
            raise ValueError("the column or the labels are not distinct names")
        if not column or "/" in column:
            raise ValueError(f"{column!r} cannot be the name of a column")
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError("weights are NaN or infinite")
        head = cls(column, labels, len(weights["norm.weight"]))
        head.load_state_dict(weights)
        return head
