"""Clipping of the gradient's global norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from bigtrain.optim.clip import CLIPS, ClipConfig

if TYPE_CHECKING:
    from torch import Tensor


@CLIPS.register
class NormClip(ClipConfig):
    """Scales the whole gradient so that its norm is at most `max` (Pascanu et al. 2013)."""

    name: Literal["norm"] = "norm"
    max: Annotated[float, Gt(0)] = 1.0
    """Largest global norm of the gradient."""

    def factor(self, norm: Tensor) -> Tensor:
        """See `ClipConfig.factor`: max / norm if the norm is larger than `max`, otherwise 1."""
        return (self.max / norm).clamp(max=1.0)
