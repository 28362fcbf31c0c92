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
        KeyError, TypeError, RuntimeError
            If it is something else.
        """
        head = cls(content["column"], content["labels"], len(content["weights"]["norm.weight"]))
        head.load_state_dict(content["weights"])
        return head
