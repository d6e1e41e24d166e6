"""A discrete autoencoder: images as grids of codes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """A convolutional encoder from pixels to logits of codes, and a decoder from codes to pixels.

    Args:
        channels: Number of channels of an image.
        maps: Number of channels of the hidden layers.
        codes: Number of different codes.
        patch: Height and width of the patch that a code stands for, in pixels; a power of two.
    """

    def __init__(self, channels: int, maps: int, codes: int, patch: int) -> None:
        super().__init__()
        down: list[nn.Module] = []
        up: list[nn.Module] = [nn.Conv2d(codes, maps, 1), nn.ReLU(), nn.Conv2d(maps, maps, 3, padding=1), nn.ReLU()]
        for number in range(patch.bit_length() - 1):
            down += [nn.Conv2d(maps if number else channels, maps, 4, 2, 1), nn.ReLU()]
            up += [nn.ConvTranspose2d(maps, maps, 4, 2, 1), nn.ReLU()]
        self.kinds = codes
        self.encoder = nn.Sequential(*down, nn.Conv2d(maps, maps, 3, padding=1), nn.ReLU(), nn.Conv2d(maps, codes, 1))
        self.decoder = nn.Sequential(*up, nn.Conv2d(maps, channels, 3, padding=1))

    def codes(self, images: Tensor) -> Tensor:
        """The most probable codes (B, P) of pixels (B, channels, S, S), row by row."""
        codes: Tensor = self.encoder(images).argmax(1).flatten(1)
        return codes

    def images(self, codes: Tensor, side: int) -> Tensor:
        """Decode codes (B, side * side) into pixels (B, channels, S, S)."""
        grid = F.one_hot(codes, self.kinds).float().transpose(1, 2).unflatten(2, (side, side))
        images: Tensor = self.decoder(grid)
        return images
