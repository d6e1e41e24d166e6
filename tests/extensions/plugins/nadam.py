"""A user's optimizer: torch's NAdam, whose state has a product of its momenta beside Adam's."""

from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt

from bigtrain.optim.config import OPTIMIZERS, Fraction, OptimizerConfig


@OPTIMIZERS.register
class NAdamConfig(OptimizerConfig):
    """Adam with Nesterov momentum (Dozat 2016)."""

    name: Literal["nadam"] = "nadam"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment."""

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.NAdam(groups, lr=self.lr, betas=self.betas, eps=self.eps, foreach=True)

    def zero_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros(()), "mu_product": torch.ones(()), **moments}
