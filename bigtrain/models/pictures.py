"""The pictures that a model family can show: grids of images, with captions if it writes text, and its attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigtrain.models.contract import Batch
from bigtrain.models.layers import Attention


@dataclass(frozen=True)
class Shown:
    """The inputs from which a family makes its pictures."""

    batch: Batch
    """The first held-out samples, on the network's device, with the names and shapes of the run's batches."""
    text: Callable[[Sequence[int]], str]
    """Decodes token ids into text, up to the end-of-text token."""

    @property
    def count(self) -> int:
        """Number of samples in the batch."""
        return len(self.batch["weights"])


@dataclass(frozen=True)
class Picture:
    """A grid of images, filled row by row."""

    images: Tensor
    """Floats (N, channels, height, width) with 1 or 3 channels. Values outside [0, 1] are clipped."""
    columns: int = 8
    captions: tuple[str, ...] = ()
    """One caption per image, shown below it; empty: no captions."""
    note: str = ""
    """A sentence that explains the picture, shown once with it."""


def one_above_the_other(upper: Tensor, lower: Tensor, columns: int = 8, note: str = "") -> Picture:
    """A grid in which each row of `upper` images stands above the same row of `lower` images.

    Args:
        upper, lower: Equally many images, (N, channels, height, width).
        note: See `Picture`.
    """
    rows = zip(upper.split(columns), lower.split(columns), strict=True)
    blank = upper.new_ones((-len(upper) % columns, *upper.shape[1:]))
    filled = [torch.cat([row, blank]) if len(row) < columns else row for pair in rows for row in pair]
    return Picture(torch.cat(filled), columns, note=note)


def attention_of(attention: Attention, run: Callable[[], object]) -> Tensor:
    """Attention weights of one layer in a forward pass, averaged over heads: FP32 (B, C, C).

    Args:
        run: Runs the forward pass.
    """
    found: list[Tensor] = []

    def look(layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(layer.probabilities(*arguments, **named).mean(1))

    hook = attention.register_forward_pre_hook(look, with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return found[-1]


def beside_attention(images: Tensor, attention: Tensor) -> Picture:
    """Each image, with a map of its attention to the right. The brightest patch of an image is white.

    Args:
        images: (B, S, S, channels), uint8, or floats from 0 to 1.
        attention: (B, patches), attention to each square patch, row by row.
    """
    side = math.isqrt(attention.shape[1])
    shares = (attention / attention.amax(1, keepdim=True).clamp(min=1e-9)).view(-1, 1, side, side)
    enlarged = shares.repeat_interleave(images.shape[1] // side, 2).repeat_interleave(images.shape[2] // side, 3)
    pixels = images.permute(0, 3, 1, 2).float() / (1 if images.is_floating_point() else 255)
    pairs = torch.stack([pixels, enlarged.expand_as(pixels)], 1)
    note = "To the right of each image, the attention to its patches: white is the most."
    return Picture(pairs.flatten(0, 1), note=note)
