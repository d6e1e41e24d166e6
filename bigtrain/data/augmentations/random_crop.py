"""Crops a part of the padded image: the usual augmentation of small images (He et al. 2016, section 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from bigtrain.data.augmentation import AUGMENTATIONS, AugmentationConfig

if TYPE_CHECKING:
    import numpy as np

    from bigtrain.data.augmentation import Image


@AUGMENTATIONS.register
class RandomCropConfig(AugmentationConfig):
    """Crops a square at a random position; an evaluation crops the centre."""

    name: Literal["random_crop"] = "random_crop"
    size: Annotated[int, Ge(1)] | None = None
    """Height and width of the crop in pixels; null: those of the image, so that only padding makes a difference."""
    padding: Annotated[int, Ge(0)] = 0
    """Number of pixels that are added on each side before cropping, in training."""
    fill: Annotated[int, Ge(0), Le(255)] = 0
    """Value of the added pixels."""

    def train(self, image: Image, random: np.random.Generator) -> Image:
        """See `AugmentationConfig`."""
        height, width = self._size(image)
        top, left = (
            int(random.integers(-self.padding, whole + self.padding - part + 1))
            for whole, part in zip(image.shape, (height, width), strict=False)
        )
        rows = slice(max(top, 0), min(top + height, image.shape[0]))
        columns = slice(max(left, 0), min(left + width, image.shape[1]))
        inside = image[rows, columns]
        if inside.shape[:2] == (height, width):
            return inside
        import numpy as np

        crop = np.full((height, width, image.shape[2]), self.fill, image.dtype)
        crop[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = inside
        return crop

    def evaluate(self, image: Image) -> Image:
        """See `AugmentationConfig`."""
        height, width = self._size(image)
        if min(image.shape[0] - height, image.shape[1] - width) < 0:
            raise ValueError(
                f"the image is smaller than the crop of {height} x {width}: set size to at most the size of the image"
            )
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        return image[top : top + height, left : left + width]

    def _size(self, image: Image) -> tuple[int, int]:
        height, width = (image.shape[0], image.shape[1]) if self.size is None else (self.size, self.size)
        if self.padding >= min(height, width):
            raise ValueError(
                f"padding {self.padding} would allow crops that contain only padding: set it below {min(height, width)}"
            )
        return height, width
