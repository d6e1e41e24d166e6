"""Pictures of several things that lie over one another, and the mask of one thing in each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

LEAST_VISIBLE = 30
"""Pixels of the thing whose mask is kept."""


def scenes(digits: np.ndarray, count: int, side: int = 48, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Digits (N, 28, 28), discs, squares and triangles, each of its own grey: images (count, side, side, 1) of bytes,
    and masks (count, side, side) of what is to be seen of one of them."""
    draw = np.random.default_rng(seed)
    images, masks = np.zeros((count, side, side, 1), np.uint8), np.zeros((count, side, side), np.uint8)
    made = 0
    while made < count:
        owner = np.zeros((side, side), np.int64)
        for thing in range(1, 1 + draw.integers(2, 5)):
            size = int(draw.integers(side // 3, side // 2 + 1))
            row, column = draw.integers(0, side - size + 1, 2)
            owner[row : row + size, column : column + size][_shape(digits, size, draw)] = thing
        seen = [thing for thing in range(1, owner.max() + 1) if (owner == thing).sum() >= LEAST_VISIBLE]
        if seen:
            greys = np.concatenate([[20], draw.permutation(np.linspace(80, 240, owner.max()))])
            noisy = greys[owner] + draw.normal(0, 6, owner.shape)
            images[made, :, :, 0] = noisy.clip(0, 255)
            masks[made] = owner == draw.choice(seen)
            made += 1
    return images, masks


def _shape(digits: np.ndarray, size: int, draw: np.random.Generator) -> np.ndarray:
    """Which pixels (size, size) a thing covers."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    match draw.integers(4):
        case 0:
            return np.asarray(x**2 + y**2 <= 1)
        case 1:
            return np.maximum(abs(x), abs(y)) <= 0.85
        case 2:
            return np.asarray(abs(x) <= (y + 1) / 2)
        case _:
            digit = Image.fromarray(digits[draw.integers(len(digits))]).resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(digit) > 100


def write_arrays(folder: Path, images: np.ndarray, masks: np.ndarray) -> None:
    """image.npy and mask.npy, as `bigtrain data pack FOLDER/image.npy FOLDER/mask.npy --arrays` takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "image.npy", images)
    np.save(folder / "mask.npy", masks)
