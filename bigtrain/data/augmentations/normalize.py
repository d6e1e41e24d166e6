"""Subtracts the mean from pixels, and divides them by the standard deviation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, MinLen

from bigtrain.data.augmentation import AUGMENTATIONS, AugmentationConfig

if TYPE_CHECKING:
    from bigtrain.data.augmentation import Image


@AUGMENTATIONS.register
class NormalizeConfig(AugmentationConfig):
    """Turns images into float32 values (x / 255 - mean) / std, in training and in evaluation."""

    name: Literal["normalize"] = "normalize"
    mean: Annotated[tuple[float, ...], MinLen(1)]
    """Mean of the pixels on the scale from 0 to 1; one value per channel, or one for all channels: [0.1307]."""
    std: Annotated[tuple[Annotated[float, Gt(0)], ...], MinLen(1)]
    """Standard deviation of the pixels on the same scale; one value per channel, or one for all channels: [0.3081]."""

    def evaluate(self, image: Image) -> Image:
        """See `AugmentationConfig`."""
        import numpy as np

        channels = image.shape[2]
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ValueError(
                    f"{key} has {len(values)} numbers, but the image has {channels} channels: give one number for "
                    "each channel"
                )
        if image.dtype != np.uint8:
            raise ValueError("the image is already normalized: list normalize only once")
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (image - 255 * mean) / (255 * std)
