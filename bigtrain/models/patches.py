"""Images as sequences of patches."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from pydantic import model_validator
from torch import Tensor

from bigtrain.models.config import ModelConfig

Positive = Annotated[int, Ge(1)]


class ImageConfig(ModelConfig):
    """The keys of a family whose blocks read the patches of square images."""

    image_size: Positive
    """Height and width of an image, in pixels."""
    channels: Positive = 3
    """Number of colour channels."""
    patch: Positive = 4
    """Height and width of a patch, in pixels."""
    layers: Positive = 4
    """Number of transformer blocks."""
    width: Positive = 128
    """Width of the residual stream; the MLP's hidden layer is four times as wide."""
    heads: Positive = 4
    """Number of attention heads."""

    @model_validator(mode="after")
    def _shape_is_possible(self) -> ImageConfig:
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Height, width and channels of an image."""
        return self.image_size, self.image_size, self.channels

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def patch_values(self) -> int:
        """Number of values in a patch, over all channels."""
        return self.patch**2 * self.channels


def cut(images: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """Cut images (B, S, S, channels) into patches (B, T, patch * patch * channels), row by row.

    uint8 values are scaled to [-1, 1]; floats, which `data.augment` has already normalized, stay unchanged.
    """
    side, channels = images.shape[1] // patch, images.shape[3]
    patches = images.reshape(-1, side, patch, side, patch, channels).transpose(2, 3)
    patches = patches.reshape(-1, side * side, patch * patch * channels)
    return (patches if images.is_floating_point() else patches / 127.5 - 1).to(dtype)
