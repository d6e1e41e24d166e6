"""Plain PyTorch modules as models: an unchanged network, and a few lines of config.

    from my_network import Network                # an nn.Module

    class Config(PlainConfig):                    # the keys under `model`
        arch: Literal["mine"] = "mine"
        data_kind: ClassVar = "images"

        def build(self, vocab_size: int) -> nn.Module:
            return Network(classes=vocab_size)

        def inputs(self, batch: Batch) -> Tensor:
            return pixels(batch)

        def loss(self, output: Tensor, batch: Batch) -> Tensor:
            return F.cross_entropy(output, batch["labels"], reduction="none")

A module may also read the batch itself and return a `LossSum`; `PlainModel` is a base class for such modules.
"""

from bigtrain.models.contract import Batch, Init, LossSum, Normal, Ones, Zeros
from bigtrain.models.loss import class_losses
from bigtrain.models.plain.across import gather_batch, sum_over_batch
from bigtrain.models.plain.family import PlainConfig, pixels
from bigtrain.models.plain.module import PlainModel

__all__ = [
    "Batch",
    "Init",
    "LossSum",
    "Normal",
    "Ones",
    "PlainConfig",
    "PlainModel",
    "Zeros",
    "class_losses",
    "gather_batch",
    "pixels",
    "sum_over_batch",
]
