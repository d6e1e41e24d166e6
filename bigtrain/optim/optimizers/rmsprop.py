"""RMSprop, with and without momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from bigtrain.optim.config import OPTIMIZERS, Fraction, OptimizerConfig

if TYPE_CHECKING:
    import torch


@OPTIMIZERS.register
class RMSpropConfig(OptimizerConfig):
    """RMSprop (Tieleman and Hinton 2012)."""

    name: Literal["rmsprop"] = "rmsprop"
    alpha: Fraction = 0.99
    """Decay rate of the second moment."""
    momentum: Fraction = 0.0
    """Decay rate of the momentum buffer; 0: no momentum."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Value added to the square root of the second moment in the update's denominator."""

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `OptimizerConfig.make`. torch has no fused kernel for RMSprop."""
        import torch

        return torch.optim.RMSprop(
            groups, lr=self.lr, alpha=self.alpha, momentum=self.momentum, eps=self.eps, foreach=True
        )

    def zero_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """A second moment of zeros, a momentum buffer if `momentum` is set, and a step count.

        torch keeps the step count on the CPU.
        """
        import torch

        keys = ("square_avg", "momentum_buffer") if self.momentum else ("square_avg",)
        # torch keeps the step count in the default dtype.
        state = {"step": torch.zeros((), dtype=torch.get_default_dtype())}
        return state | {key: torch.zeros_like(parameter) for key in keys}
