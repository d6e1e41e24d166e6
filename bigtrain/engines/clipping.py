"""The norm of the gradient, and clipping by it: what every engine does between backward pass and update.

An engine multiplies its gradients once, by the product of two factors: what makes them the mean over the global batch,
and what keeps the norm of that mean below `optimizer.clip`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def square_of(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of this rank's gradients, float64; the squares of all ranks add up to the norm's.

    Args:
        gradients: Each counts on one rank alone: of replicated parameters those of one replica.
        device: Where there are no gradients.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()


def clipped(scale: Tensor, norm: Tensor, clip: float | None) -> Tensor:
    """`scale`, times clip / norm where the norm is larger than `clip` (Pascanu et al. 2013).

    Args:
        scale: What the gradients are to be multiplied by; float64 scalar.
        norm: Of the gradients after that.
        clip: The section's `optimizer.clip`; None: no limit.
    """
    return scale if clip is None else scale * (clip / norm).clamp(max=1.0)
