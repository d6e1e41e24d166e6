"""Base class of the section `optimizer.clip`. Does not import torch.

A kind of clipping is one file in clips/; `--plugin` adds the user's own. `engines.clipping` applies it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bigtrain.config import Registry, Section

if TYPE_CHECKING:
    from torch import Tensor


class ClipConfig(Section):
    """Base class of gradient clipping. A subclass adds its keys, and `factor`, `change` or both.

    Both see the gradients of the mean loss of the global batch, in FP32.
    """

    by_parameter: ClassVar[bool] = False
    """Whether `change` needs the gradient of each parameter in its own shape. Only the engine fsdp supports this, since
    the others flatten parameters or hold them as shards without a placement."""

    name: str
    """Kind of clipping: a file in bigtrain/optim/clips, or a class of a plugin."""

    def factor(self, norm: Tensor) -> Tensor | float:
        """The factor by which all gradients are multiplied.

        Args:
            norm: Global norm of the gradient, over all ranks; a float64 scalar on the device.
        """
        return 1.0

    def change(self, gradients: list[Tensor], parameters: list[Tensor]) -> None:
        """Change the gradients in place, after they have been multiplied by `factor`; to be called without autograd.

        Args:
            gradients: This rank's shards, of any shapes: each element must change independently of the others. With
                `by_parameter`, the gradients of `parameters`, which are tensors or DTensors, on every rank the same.
            parameters: The parameters with `by_parameter`, otherwise empty.
        """


CLIPS = Registry(
    "clip", ClipConfig, package="bigtrain.optim.clips", default="norm", where="optimizer.clip.name", short="max"
)
"""All kinds of gradient clipping, by `optimizer.clip.name`; a number is short for {name: norm, max: NUMBER}."""
