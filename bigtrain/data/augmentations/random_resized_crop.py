"""Crops and scales a part of random size and shape: the usual augmentation of photographs (Szegedy et al. 2015)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le

from bigtrain.data.augmentation import AUGMENTATIONS, RANGE, AugmentationConfig, Positive
from bigtrain.data.formats.images import array_of, picture_of

if TYPE_CHECKING:
    import numpy as np

    from bigtrain.data.augmentation import Image

Share = Annotated[float, Gt(0), Le(1)]

TRIES = 10
"""Number of random shapes that are tried before the centre of the image is taken, as in torchvision."""


@AUGMENTATIONS.register
class RandomResizedCropConfig(AugmentationConfig):
    """Crops a random rectangle and scales it to a square; an evaluation scales the largest square at the centre."""

    name: Literal["random_resized_crop"] = "random_resized_crop"
    size: Annotated[int, Ge(1)]
    """Height and width of the result in pixels."""
    scale: Annotated[tuple[Share, Share], RANGE] = (0.08, 1.0)
    """Minimum and maximum area of a crop, as a share of the image's area."""
    ratio: Annotated[tuple[Positive, Positive], RANGE] = (3 / 4, 4 / 3)
    """Minimum and maximum ratio of a crop's width to its height."""

    def train(self, image: Image, random: np.random.Generator) -> Image:
        """See `AugmentationConfig`."""
        height, width = image.shape[:2]
        for _ in range(TRIES):
            area = height * width * random.uniform(*self.scale)
            ratio = math.exp(random.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < across <= width and 0 < down <= height:
                left, top = int(random.integers(width - across + 1)), int(random.integers(height - down + 1))
                return self._scaled(image, left, top, across, down)
        return self.evaluate(image)

    def evaluate(self, image: Image) -> Image:
        """See `AugmentationConfig`."""
        height, width = image.shape[:2]
        side = min(height, width)
        return self._scaled(image, (width - side) // 2, (height - side) // 2, side, side)

    def _scaled(self, image: Image, left: int, top: int, width: int, height: int) -> Image:
        from PIL.Image import Resampling

        box = (left, top, left + width, top + height)
        return array_of(picture_of(image).resize((self.size, self.size), Resampling.BILINEAR, box, reducing_gap=3.0))
