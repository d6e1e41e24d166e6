"""Gradient norm and gradient clipping, which every engine does between the backward pass and the update.

An engine multiplies its gradients once, by the product of two factors. The first factor makes them the gradient of the
mean loss of the global batch. The second one clips the norm of that gradient to `optimizer.clip`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def square_of(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Sum of the squares of this rank's gradients, a float64 scalar. The sum over all ranks is the squared norm.

    Args:
        gradients: The gradients that this rank counts. Of a replicated parameter, exactly one rank counts the gradient.
        device: Device of the result if `gradients` is empty.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()


def clipped(scale: Tensor, norm: Tensor, clip: float | None) -> Tensor:
    """`scale`, multiplied by clip / norm if `norm` is larger than `clip` (Pascanu et al. 2013).

    Args:
        scale: Factor by which the gradients are to be multiplied, a float64 scalar.
        norm: Norm of the gradients after the multiplication by `scale`.
        clip: Largest norm, `optimizer.clip`; None: no limit.
    """
    return scale if clip is None else scale * (clip / norm).clamp(max=1.0)
