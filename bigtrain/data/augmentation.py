"""What an augmentation is: one class in one file, `augmentations/NAME.py` or a user's `--plugin FILE`.

    @AUGMENTATIONS.register
    class InvertConfig(AugmentationConfig):
        name: Literal["invert"] = "invert"
        p: Annotated[float, Ge(0), Le(1)] = 0.5

        def train(self, image: Image, random: np.random.Generator) -> Image:
            return 255 - image if random.random() < self.p else image

An image is an array (height, width, channels): uint8 from 0 to 255, or float32 once it is normalized. Methods return a
new array or a view, and change nothing in place. All randomness comes from the generator that they are given: it is
seeded by the run's seed, the epoch and the sample, so that no layout, worker or resume changes an image.
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
        raise ValueError(f"{list(value)} is no range: write the smaller number first")
    return value


RANGE: Final = AfterValidator(_in_order)
"""Holds a pair of numbers to be the least and the largest."""


class AugmentationConfig(Section):
    """What all augmentations share; an augmentation adds its keys, and overrides `train`, `evaluate` or `mix`."""

    mixes: ClassVar[bool] = False
    """Whether it makes one image of two by `mix`, so that labels become class probabilities."""

    name: str
    """Which augmentation: a file of bigtrain/data/augmentations, or the name of a plugin's class."""

    def train(self, image: Image, random: np.random.Generator) -> Image:
        """An image of a training batch.

        Raises:
            ValueError: It does not take images of this size or type.
        """
        return self.evaluate(image)

    def evaluate(self, image: Image) -> Image:
        """An image of an evaluation, of the size and type that `train` gives. The default changes nothing.

        Raises:
            ValueError: It does not take images of this size or type.
        """
        return image

    def mix(self, image: Image, other: Image, random: np.random.Generator) -> tuple[Image, float]:
        """One training image of two, where `mixes`; and the share of the first one's label in its label.

        Args:
            other: Another image of the same global batch.
        """
        raise NotImplementedError


AUGMENTATIONS = Registry(
    "augmentation", AugmentationConfig, package="bigtrain.data.augmentations", where="data.augment"
)
