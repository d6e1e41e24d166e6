"""Images as sequences of patches."""

from __future__ import annotations

import torch
from torch import Tensor


def cut(images: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """Pixels 0..255 (B, S, S, channels) as patches (B, T, patch * patch * channels) in -1..1, row after row."""
    side, channels = images.shape[1] // patch, images.shape[3]
    patches = images.reshape(-1, side, patch, side, patch, channels).transpose(2, 3)
    return (patches.reshape(-1, side * side, patch * patch * channels) / 127.5 - 1).to(dtype)
