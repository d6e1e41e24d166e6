"""The base class of augmentations. Each is one class in one file, `augmentations/NAME.py` or a user's `--plugin FILE`.

    @AUGMENTATIONS.register
    class InvertConfig(AugmentationConfig):
        name: Literal["invert"] = "invert"
        p: Annotated[float, Ge(0), Le(1)] = 0.5

        def train(self, image: Image, random: np.random.Generator) -> Image:
            return 255 - image if random.random() < self.p else image

An image is an array of shape (height, width, channels): uint8 from 0 to 255, or float32 after `normalize`. Methods
return a new array or a view, and change nothing in place. All random numbers must come from the given generator. It is
seeded with the run's seed, the epoch and the sample, so an image does not depend on layout, worker or resume.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final

from annotated_types import Gt
from pydantic import AfterValidator

from bigtrain.config import Registry, Section

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Image = npt.NDArray[Any]

Positive = Annotated[float, Gt(0)]


def _in_order(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"{list(value)} is not a range: write the smaller number first")
    return value


RANGE: Final = AfterValidator(_in_order)
"""Validates that a pair of numbers is a range: the smallest value, then the largest."""


class AugmentationConfig(Section):
    """Base class of augmentations. A subclass adds its keys, and overrides `train`, `evaluate` or `mix`."""

    mixes: ClassVar[bool] = False
    """Whether `mix` combines two images into one, so that labels become class probabilities."""

    name: str
    """Name of the augmentation: of a file in bigtrain/data/augmentations, or of a plugin's class."""

    def train(self, image: Image, random: np.random.Generator) -> Image:
        """Augment an image of a training batch; by default as in an evaluation.

        Raises:
            ValueError: The augmentation does not support images of this size or type.
        """
        return self.evaluate(image)

    def evaluate(self, image: Image) -> Image:
        """Prepare an image for an evaluation, with the shape and dtype that `train` returns; by default unchanged.

        Raises:
            ValueError: The augmentation does not support images of this size or type.
        """
        return image

    def mix(self, image: Image, other: Image, random: np.random.Generator) -> tuple[Image, float]:
        """Combine two training images into one; only called if `mixes`.

        Args:
            other: Another image of the same global batch.

        Returns:
            The mixed image, and the share of the first image's label in its label.
        """
        raise NotImplementedError


AUGMENTATIONS = Registry(
    "augmentation", AugmentationConfig, package="bigtrain.data.augmentations", where="data.augment"
)
