"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Gt

from bigtrain.optim.config import OPTIMIZERS, Fraction, NonNegative, OptimizerConfig

if TYPE_CHECKING:
    import torch


class AdamFamily(OptimizerConfig):
    """What Adam and AdamW share: two moments, updated by one fused kernel.

    The kernel is the fastest on CPU and GPU, and it works element by element, so that no reduction's order can change a
    bit. It takes DTensors.
    """

    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment."""

    def zero_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Two moments of zero, and a step count on the parameter's device, where the fused kernel reads it."""
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
