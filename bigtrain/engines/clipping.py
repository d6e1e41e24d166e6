"""Gradient norm and gradient clipping, which every engine does between the backward pass and the update.

An engine multiplies its gradients once, by the product of two factors. The first factor makes them the gradient of the
mean loss of the global batch, and the second is that of `optimizer.clip`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bigtrain.optim.clip import ClipConfig


def square_of(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Sum of the squares of this rank's gradients, a float64 scalar. The sum over all ranks is the squared norm.

    Args:
        gradients: The gradients that this rank counts. Of a replicated parameter, exactly one rank counts the gradient.
        device: Device of the result if `gradients` is empty.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()


@torch.no_grad()
def scale_and_clip(
    gradients: list[Tensor],
    scale: Tensor,
    norm: Tensor,
    clip: ClipConfig | None,
    parameters: Iterable[Tensor] = (),
) -> None:
    """Turn gradients of the sum of losses into the clipped ones of the mean loss, in place.

    It is collective if `clip.by_parameter` is true.

    Args:
        gradients: This rank's gradients, or shards of them.
        scale: Factor that makes them the gradients of the mean loss, a float64 scalar.
        norm: Global norm of the gradients after the multiplication by `scale`.
        clip: The section `optimizer.clip`; None: no clipping.
        parameters: The parameters whose gradients these are, for `clip.by_parameter`.
    """
    if clip is not None:
        scale = scale * clip.factor(norm)
    if gradients:
        torch._foreach_mul_(gradients, scale.to(gradients[0].device, torch.float32))
    if clip is not None and clip.by_parameter:
        pairs = [(parameter.grad, parameter) for parameter in parameters if parameter.grad is not None]
        clip.change([gradient for gradient, _ in pairs], [parameter for _, parameter in pairs])
    elif clip is not None:
        clip.change(gradients, [])
