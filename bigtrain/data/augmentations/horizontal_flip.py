"""Mirrors images left to right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from bigtrain.data.augmentation import AUGMENTATIONS, AugmentationConfig

if TYPE_CHECKING:
    import numpy as np

    from bigtrain.data.augmentation import Image


@AUGMENTATIONS.register
class HorizontalFlipConfig(AugmentationConfig):
    """Mirrors training images left to right, with a probability."""

    name: Literal["horizontal_flip"] = "horizontal_flip"
    p: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability that an image is mirrored."""

    def train(self, image: Image, random: np.random.Generator) -> Image:
        """See `AugmentationConfig`."""
        return image[:, ::-1] if random.random() < self.p else image
