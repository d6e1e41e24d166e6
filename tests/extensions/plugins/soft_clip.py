"""A user's clipping: each element of the gradient goes through a hyperbolic tangent."""

from typing import Annotated, Literal

import torch
from annotated_types import Gt

from bigtrain.optim.clip import CLIPS, ClipConfig


@CLIPS.register
class SoftClip(ClipConfig):
    """Bends each element of the gradient smoothly towards a limit."""

    name: Literal["soft"] = "soft"
    limit: Annotated[float, Gt(0)] = 1.0
    """The value that large elements approach."""

    def change(self, gradients: list[torch.Tensor], parameters: list[torch.Tensor]) -> None:
        for gradient in gradients:
            gradient.div_(self.limit).tanh_().mul_(self.limit)
