"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Gt

from bigtrain.optim.config import OPTIMIZERS, Fraction, NonNegative, OptimizerConfig

if TYPE_CHECKING:
    import torch


class AdamFamily(OptimizerConfig):
    """Base class of Adam and AdamW: both keep two moments, which one fused kernel updates.

    The fused kernel is the fastest on CPU and GPU. It works element by element, so no order of reduction can change a
    bit of the result. It supports DTensors.
    """

    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of the first and second moments."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Value added to the square root of the second moment in the update's denominator."""

    def zero_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Two moments of zeros, and an FP32 step count on the parameter's device, as the fused kernel requires."""
        import torch

        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments}


@OPTIMIZERS.register
class AdamWConfig(AdamFamily):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    follows_mup: ClassVar[bool] = True

    name: Literal["adamw"] = "adamw"
    weight_decay: NonNegative = 0.1

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `OptimizerConfig.make`."""
        import torch

        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
