"""Points and boxes that prompt a segmentation model; coordinates are (row, column), relative, from 0 to 1."""

from __future__ import annotations

import torch
from torch import Tensor


def at(point: Tensor, mask: Tensor) -> Tensor:
    """Boolean (B, S, S), true only at the pixel that contains each point (B, 2)."""
    row, column = ((point[:, axis, None, None] * mask.shape[1]).long() for axis in (0, 1))
    number = torch.arange(mask.shape[1], device=mask.device)
    return (number[:, None] == row) & (number == column)


def point_in(mask: Tensor) -> Tensor:
    """The centre (B, 2) of a random pixel inside each mask (B, S, S); any pixel of the image if the mask is empty."""
    side = mask.shape[1]
    inside = mask.flatten(1)
    drawn = torch.rand(inside.shape, device=mask.device) + inside.float()
    pixel = drawn.argmax(1)
    return (torch.stack([pixel // side, pixel % side], 1) + 0.5) / side


def box_around(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First and last corner, each (B, 2), of the bounding box of each mask (B, S, S).

    If a mask is empty, they are the corners of the image.
    """
    mask = mask | ~mask.any((1, 2), keepdim=True)
    side = mask.shape[1]
    filled = torch.stack([mask.any(2), mask.any(1)], 1).float()
    first, last = filled.argmax(2), side - filled.flip(2).argmax(2)
    return first / side, last / side
