from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.models.plain import Batch, PlainConfig, pixels

from .network import DigitsNet


class Config(PlainConfig):
    data_kind: ClassVar = "images"
    arch: Literal["digits-net"] = "digits-net"
    width: int = 32

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (28, 28, 1)  # height, width, channels

    def build(self, vocab_size: int) -> nn.Module:
        return DigitsNet(classes=vocab_size, width=self.width)

    def inputs(self, batch: Batch) -> Tensor:
        return pixels(batch)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch["labels"], reduction="none")
