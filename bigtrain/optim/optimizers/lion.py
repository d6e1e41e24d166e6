"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Gt

from bigtrain.optim.config import OPTIMIZERS, Fraction, NonNegative, OptimizerConfig

if TYPE_CHECKING:
    import torch


@OPTIMIZERS.register
class LionConfig(OptimizerConfig):
    """Lion with decoupled weight decay (Chen et al. 2023, algorithm 2).

    Its learning rate should be 3 to 10 times smaller than AdamW's.
    """

    follows_mup: ClassVar[bool] = True

    name: Literal["lion"] = "lion"
    lr: Annotated[float, Gt(0)] = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """Weight of the old momentum in the update, and its weight in the next momentum."""
    weight_decay: NonNegative = 1.0

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `OptimizerConfig.make`."""
        return _lion(groups, self)

    def zero_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """A momentum of zeros."""
        import torch

        return {"exp_avg": torch.zeros_like(parameter)}


def _lion(groups: list[dict[str, Any]], config: LionConfig) -> torch.optim.Optimizer:
    import torch

    class Lion(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                (first, second), lr, decay = group["betas"], group["lr"], group["weight_decay"]
                parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
                for parameter in parameters:
                    if not self.state[parameter]:
                        self.state[parameter].update(config.zero_state(parameter))
                if not parameters:
                    continue
                gradients = [parameter.grad for parameter in parameters]
                momenta = [self.state[parameter]["exp_avg"] for parameter in parameters]
                updates = torch._foreach_lerp(momenta, gradients, 1 - first)
                torch._foreach_sign_(updates)
                torch._foreach_mul_(parameters, 1 - lr * decay)
                torch._foreach_add_(parameters, updates, alpha=-lr)
                torch._foreach_lerp_(momenta, gradients, 1 - second)

    return Lion(groups, {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay})
