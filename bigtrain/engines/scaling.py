"""Dynamic loss scaling for FP16 (Micikevicius et al. 2018), entirely on the device.

The scale multiplies the weights of a batch, and with them the sums of losses and weights and every gradient. The scale
is a power of two, so dividing by it again is exact. Scales are smaller than in other frameworks, because the loss is a
sum over tokens, not a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigtrain.models.contract import Batch

INITIAL_SCALE = 2.0**12
MIN_SCALE = 2.0**-8
MAX_SCALE = 2.0**24
GROWTH_STEPS = 2000
"""Number of consecutive steps without an overflow after which the scale doubles."""


class LossScale:
    """The loss scale and its count of steps without an overflow; equal on all ranks, which see the same overflows."""

    def __init__(self, device: torch.device, growth_steps: int = GROWTH_STEPS) -> None:
        self.scale = torch.full((), INITIAL_SCALE, dtype=torch.float32, device=device)
        self._since = torch.zeros((), dtype=torch.int32, device=device)
        self._growth_steps = growth_steps

    def scaled(self, batch: Batch) -> Batch:
        """The micro-batch with scaled weights, so that its loss and gradients are scaled."""
        return {**batch, "weights": batch["weights"] * self.scale}

    def update(self, bad: Tensor) -> None:
        """Halve the scale after an overflow; double it after `growth_steps` consecutive steps without one.

        Args:
            bad: Boolean scalar: whether this step overflowed.
        """
        torch._amp_update_scale_(self.scale, self._since, bad.to(torch.float32), 2.0, 0.5, self._growth_steps)
        self.scale.clamp_(MIN_SCALE, MAX_SCALE)

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds, to be saved and loaded in place."""
        return {"loss_scale.scale": self.scale, "loss_scale.since": self._since}
