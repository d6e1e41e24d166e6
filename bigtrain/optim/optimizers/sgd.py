"""Stochastic gradient descent, with and without momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from bigtrain.optim.config import OPTIMIZERS, Fraction, OptimizerConfig

if TYPE_CHECKING:
    import torch


@OPTIMIZERS.register
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    momentum: Fraction = 0.0
    """Decay rate of the momentum buffer; 0: no momentum."""
    nesterov: bool = False
    """Whether to use Nesterov momentum; requires `momentum` above 0."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum greater than 0")
        return self

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `OptimizerConfig.make`. It is not fused: the fused kernel does not support DTensors."""
        import torch

        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, foreach=True)

    def zero_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """A momentum buffer of zeros if `momentum` is set; otherwise no state.

        torch sets the buffer to the first gradient. Without dampening, a step from zeros gives the same buffer.
        """
        import torch

        return {"momentum_buffer": torch.zeros_like(parameter)} if self.momentum else {}
