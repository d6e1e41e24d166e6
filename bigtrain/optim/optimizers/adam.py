"""Adam, with the weight decay added to the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from bigtrain.optim.config import OPTIMIZERS, Fraction
from bigtrain.optim.optimizers.adamw import AdamFamily

if TYPE_CHECKING:
    import torch


@OPTIMIZERS.register
class AdamConfig(AdamFamily):
    """Adam (Kingma and Ba 2015); its weight decay is added to the gradient."""

    name: Literal["adam"] = "adam"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `OptimizerConfig.make`."""
        import torch

        return torch.optim.Adam(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
