"""Clipping of the gradient's elements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from bigtrain.optim.clip import CLIPS, ClipConfig

if TYPE_CHECKING:
    from torch import Tensor


@CLIPS.register
class ValueClip(ClipConfig):
    """Limits each element of the gradient to the range from -`max` to `max`, as torch's `clip_grad_value_` does."""

    name: Literal["value"] = "value"
    max: Annotated[float, Gt(0)]
    """Largest absolute value of an element of the gradient."""

    def change(self, gradients: list[Tensor], parameters: list[Tensor]) -> None:
        """See `ClipConfig.change`."""
        import torch

        if gradients:
            torch._foreach_clamp_min_(gradients, -self.max)
            torch._foreach_clamp_max_(gradients, self.max)
