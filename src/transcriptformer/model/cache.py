"""Key-value cache: what attention keeps of earlier positions, so that each next gene costs one position, not all.

Notation: B cells, H heads, T positions so far (auxiliary tokens, [START], genes), n new ones, d = D / H.
"""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, (B, H, capacity, d); the first `length` positions are filled."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.length = keys, values, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, n, d) and return all of them, (B, H, T + n, d)."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class KeyValueCache:
    """Keys, values, count biases and masks of all positions of a batch of cells, filled by `TranscriptFormer.extend`.

    Parameters
    ----------
    n_layers
        Layers of the model.
    shape
        B, H, maximum number of positions, and d.
    """

    def __init__(
        self, n_layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        keys, values = (torch.empty(n_layers, *shape, dtype=dtype, device=device) for _ in range(2))
        self.layers = [LayerCache(k, v) for k, v in zip(keys, values, strict=True)]
        cells, _, capacity, _ = shape
        self.key_bias = torch.empty(cells, capacity, device=device)
        self.key_allowed = torch.empty(cells, capacity, dtype=torch.bool, device=device)

    @property
    def length(self) -> int:
        """Number of positions so far, T."""
        return self.layers[0].length

    def append_masks(self, key_bias: Tensor, key_allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Append the bias and mask of new keys (B, n) and return those of all keys, (B, T + n)."""
        stop = self.length + key_bias.shape[1]
        self.key_bias[:, self.length : stop] = key_bias
        self.key_allowed[:, self.length : stop] = key_allowed
        return self.key_bias[:, :stop], self.key_allowed[:, :stop]
