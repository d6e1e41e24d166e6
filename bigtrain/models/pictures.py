"""What a family shows of itself: grids of images, with a text under each where it writes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigtrain.models.contract import Batch


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
