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
    """Decay rate of the velocity; 0: none."""
    nesterov: bool = False
    """Nesterov's form; needs momentum."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum greater than 0")
        return self

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `OptimizerConfig.make`; the fused kernel takes no DTensors."""
        import torch

        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, foreach=True)

    def zero_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """A velocity of zero. torch takes the first gradient as the velocity: so does a step from zero, undampened."""
        import torch

        return {"momentum_buffer": torch.zeros_like(parameter)} if self.momentum else {}
