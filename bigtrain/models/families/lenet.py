"""A small convolutional network (LeNet-5, LeCun et al. 1998): convolutions and pooling, then dense layers.

The defaults are the sizes of the paper. `{maps: [32, 64], kernel: 3, hidden: [128], activation: relu, pool: max,
dropout: 0.5}` is similar to the network of Keras' MNIST example.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from annotated_types import Ge, Lt, MinLen
from pydantic import model_validator
from torch import Tensor, nn

from bigtrain.models.config import FAMILIES
from bigtrain.models.plain.classifier import ClassifierConfig, Positive

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}
POOLS = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}


@FAMILIES.register
class Config(ClassifierConfig):
    """Convolutions, each followed by pooling that halves the image, then dense layers."""

    arch: Literal["lenet"] = "lenet"
    maps: Annotated[tuple[Positive, ...], MinLen(1)] = (6, 16)
    """Number of channels after each convolution."""
    kernel: Positive = 5
    """Height and width of the convolutions, in pixels; the first one pads the image, so that its size stays."""
    hidden: tuple[Positive, ...] = (120, 84)
    """Widths of the dense layers before the last one."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation after each layer except the last."""
    pool: Literal["average", "max"] = "average"
    """Pooling of 2 x 2 pixels after each convolution."""
    batch_norm: bool = False
    """Whether each convolution is followed by BatchNorm (Ioffe and Szegedy 2015), before its activation."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability that an input of a dense layer is dropped (Srivastava et al. 2014)."""

    @model_validator(mode="after")
    def _image_is_large_enough(self) -> Config:
        if self.last_size < 1:
            raise ValueError(
                f"image_size {self.image_size} is too small for {len(self.maps)} convolutions of kernel {self.kernel}: "
                "name fewer maps, or a smaller kernel"
            )
        return self

    @property
    def last_size(self) -> int:
        """Height and width of the last feature maps, in pixels."""
        size = (self.image_size + 2 * (self.kernel // 2) - self.kernel + 1) // 2
        for _ in self.maps[1:]:
            size = (size - self.kernel + 1) // 2
        return size

    def build(self, vocab_size: int) -> LeNet:
        """The classifier for `vocab_size` classes, initialised by torch's defaults."""
        return LeNet(self, vocab_size)


class LeNet(nn.Module):
    """The modules `features` (convolutions), then `classifier` (dense layers)."""

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        activation, pool = ACTIVATIONS[config.activation], POOLS[config.pool]
        widths = config.channels, *config.maps
        features: list[nn.Module] = []
        for number, (before, after) in enumerate(itertools.pairwise(widths)):
            padding = 0 if number else config.kernel // 2
            features.append(nn.Conv2d(before, after, config.kernel, padding=padding, bias=not config.batch_norm))
            features += [nn.BatchNorm2d(after)] if config.batch_norm else []
            features += [activation(), pool(2)]
        self.features = nn.Sequential(*features, nn.Flatten())
        widths = widths[-1] * config.last_size**2, *config.hidden
        classifier: list[nn.Module] = []
        for before, after in zip(widths, (*config.hidden, classes), strict=True):
            classifier += [nn.Dropout(config.dropout)] if config.dropout else []
            classifier += [nn.Linear(before, after), activation()]
        self.classifier = nn.Sequential(*classifier[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, size, size)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
