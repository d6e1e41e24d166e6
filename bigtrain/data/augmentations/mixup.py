"""Averages two images and their labels (Zhang et al. 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt

from bigtrain.data.augmentation import AUGMENTATIONS, AugmentationConfig

if TYPE_CHECKING:
    import numpy as np

    from bigtrain.data.augmentation import Image


@AUGMENTATIONS.register
class MixupConfig(AugmentationConfig):
    """Averages each training image with another one of its global batch, and averages their labels too.

    Labels become class probabilities, float32 of shape (B, classes), which `F.cross_entropy` accepts.
    """

    mixes: ClassVar[bool] = True

    name: Literal["mixup"] = "mixup"
    alpha: Annotated[float, Gt(0)] = 0.2
    """Both parameters of the beta distribution from which the weight of the first image is sampled."""

    def mix(self, image: Image, other: Image, random: np.random.Generator) -> tuple[Image, float]:
        """See `AugmentationConfig`. The mean of uint8 images is rounded."""
        import numpy as np

        share = random.beta(self.alpha, self.alpha)
        mixed = np.float32(share) * image + np.float32(1 - share) * other
        return mixed.round().astype(np.uint8) if image.dtype == np.uint8 else mixed, share
