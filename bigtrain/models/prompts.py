"""Points and boxes that say which part of an image is meant; places are row and column from 0 to 1."""

from __future__ import annotations

import torch
from torch import Tensor


def at(point: Tensor, mask: Tensor) -> Tensor:
    """The pixels (B, S, S) of points (B, 2)."""
    row, column = ((point[:, axis, None, None] * mask.shape[1]).long() for axis in (0, 1))
    number = torch.arange(mask.shape[1], device=mask.device)
    return (number[:, None] == row) & (number == column)


def point_in(mask: Tensor) -> Tensor:
    """A point (B, 2) drawn from each mask (B, S, S): row and column of a pixel's centre, from 0 to 1."""
    side = mask.shape[1]
    inside = mask.flatten(1)
    drawn = torch.rand(inside.shape, device=mask.device) + inside.float()
    pixel = drawn.argmax(1)
    return (torch.stack([pixel // side, pixel % side], 1) + 0.5) / side


def box_around(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last corner (B, 2) of what is in each mask (B, S, S); the image's where that is empty."""
    mask = mask | ~mask.any((1, 2), keepdim=True)
    side = mask.shape[1]
    filled = torch.stack([mask.any(2), mask.any(1)], 1).float()
    first, last = filled.argmax(2), side - filled.flip(2).argmax(2)
    return first / side, last / side
