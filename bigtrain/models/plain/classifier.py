"""The config keys that all classifiers of square images share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from torch import Tensor

from bigtrain.models.config import DataKind
from bigtrain.models.contract import Batch
from bigtrain.models.loss import class_losses
from bigtrain.models.plain.family import PlainConfig, pixels

Positive = Annotated[int, Ge(1)]


class ClassifierConfig(PlainConfig):
    """A network that maps images (B, channels, image_size, image_size) to logits (B, classes)."""

    data_kind: ClassVar[DataKind] = "images"
    loss_unit: ClassVar[str] = "nats per image"

    image_size: Positive
    """Height and width of an image, in pixels."""
    channels: Positive = 3
    """Number of colour channels."""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.image_size, self.image_size, self.channels

    def inputs(self, batch: Batch) -> Tensor:
        """The images, FP32 (B, channels, image_size, image_size)."""
        return pixels(batch)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The cross-entropy of each image, FP32 (B,), in nats."""
        return class_losses(output, batch)
