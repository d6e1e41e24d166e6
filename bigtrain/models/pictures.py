"""What a family shows of itself: grids of images, with a text under each where it writes one, and its attention."""

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
    """What a picture is made from."""

    batch: Batch
    """The first held-out samples, on the network's device, with the names and shapes of the run's batches."""
    text: Callable[[Sequence[int]], str]
    """The text of tokens, up to the end of text."""

    @property
    def count(self) -> int:
        """Samples of the batch."""
        return len(self.batch["weights"])


@dataclass(frozen=True)
class Picture:
    """Images in rows."""

    images: Tensor
    """(N, channels, height, width) from 0 to 1, of 1 or 3 channels; others are clipped."""
    columns: int = 8
    captions: tuple[str, ...] = ()
    """A text under each image; none: no text."""


def one_above_the_other(upper: Tensor, lower: Tensor, columns: int = 8) -> Picture:
    """Pairs of images, each in the same column: a row of `upper`, below it the same row of `lower`."""
    rows = zip(upper.split(columns), lower.split(columns), strict=True)
    blank = upper.new_ones((-len(upper) % columns, *upper.shape[1:]))
    filled = [torch.cat([row, blank]) if len(row) < columns else row for pair in rows for row in pair]
    return Picture(torch.cat(filled), columns)


def attention_of(attention: Attention, run: Callable[[], object]) -> Tensor:
    """The mean over heads of `Attention.probabilities` (B, C, C) of a layer in a pass.

    Args:
        run: Makes the pass.
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
    """Each image with its attention beside it, patch by patch: brighter is more, white is the most of this image.

    Args:
        images: (B, S, S, channels), uint8, or floats from 0 to 1.
        attention: (B, patches) of square patches, row after row.
    """
    side = math.isqrt(attention.shape[1])
    shares = (attention / attention.amax(1, keepdim=True).clamp(min=1e-9)).view(-1, 1, side, side)
    enlarged = shares.repeat_interleave(images.shape[1] // side, 2).repeat_interleave(images.shape[2] // side, 3)
    pixels = images.permute(0, 3, 1, 2).float() / (1 if images.is_floating_point() else 255)
    pairs = torch.stack([pixels, enlarged.expand_as(pixels)], 1)
    return Picture(pairs.flatten(0, 1))
