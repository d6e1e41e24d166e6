"""Rotates, translates, scales and shears images at random."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le, Lt

from bigtrain.data.augmentation import AUGMENTATIONS, RANGE, AugmentationConfig, Positive
from bigtrain.data.formats.images import array_of, picture_of

if TYPE_CHECKING:
    import numpy as np

    from bigtrain.data.augmentation import Image


@AUGMENTATIONS.register
class RandomAffineConfig(AugmentationConfig):
    """Applies a random affine map around the centre of a training image, with bilinear interpolation."""

    name: Literal["random_affine"] = "random_affine"
    degrees: Annotated[float, Ge(0), Le(180)] = 0.0
    """Maximum rotation angle, in degrees, in either direction."""
    translate: Annotated[float, Ge(0), Le(1)] = 0.0
    """Maximum translation along each axis, as a share of the image's width or height."""
    scale: Annotated[tuple[Positive, Positive], RANGE] = (1.0, 1.0)
    """Minimum and maximum factor by which the image is scaled."""
    shear: Annotated[float, Ge(0), Lt(90)] = 0.0
    """Maximum shear angle of vertical lines, in degrees, in either direction."""
    fill: Annotated[int, Ge(0), Le(255)] = 0
    """Value of the pixels that lie outside the image."""

    def train(self, image: Image, random: np.random.Generator) -> Image:
        """See `AugmentationConfig`."""
        from PIL.Image import Resampling, Transform

        height, width = image.shape[:2]
        turn, lean, right, down = random.uniform(-1, 1, 4)
        angle, shear = math.radians(turn * self.degrees), math.tan(math.radians(lean * self.shear))
        factor = random.uniform(*self.scale)
        # Maps coordinates of the result to coordinates of the image: the inverse of turn(angle) shear(shear) factor.
        cosine, sine = math.cos(angle) / factor, math.sin(angle) / factor
        a, b, c, d = cosine + shear * sine, sine - shear * cosine, -sine, cosine
        x, y = width / 2, height / 2
        x_to, y_to = x + right * self.translate * width, y + down * self.translate * height
        data = (a, b, x - a * x_to - b * y_to, c, d, y - c * x_to - d * y_to)
        picture = picture_of(image)
        fill = self.fill if image.shape[2] == 1 else (self.fill,) * 3
        return array_of(picture.transform(picture.size, Transform.AFFINE, data, Resampling.BILINEAR, fillcolor=fill))
