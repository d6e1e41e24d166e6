"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CPU_CHUNK_LOGITS = 1 << 24
"""Logits of a chunk on a CPU: 64 MB in FP32. Measured: smaller chunks gain nothing from the cache."""
GPU_CHUNK_LOGITS = 1 << 28
"""Logits of a chunk elsewhere: 1 GB in FP32, large enough that matmuls run at full speed."""
MIN_CHUNK_TOKENS = 256


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """The weighted sum of cross-entropies of `targets` under the logits `hidden @ weight.T`, in nats.

    The logits exist for one chunk of tokens at a time. Where gradients are needed they are formed in the
    forward pass, chunk by chunk, so that the head is multiplied as often as in the plain form (3 matmuls) and
    no logit is kept. Matmuls run in the dtype of `hidden`; softmax, loss and the sums over chunks in FP32, or
    FP64 for FP64.

    Args:
        hidden: (..., W).
        weight: (V, W), in any dtype.
        targets: int64 (...), each in [0, V), also where the weight is 0.
        weights: (...), the factor of each token's loss.
        chunk_tokens: Tokens of one chunk; None chooses by device and V.
        z_loss: Factor of log(Z)^2, added to each token's loss (Chowdhery et al. 2022, section 5).

    Returns:
        Scalar in FP32 (FP64 for FP64). Its backward pass can run once.
    """
    if chunk_tokens is None:
        logits = CPU_CHUNK_LOGITS if hidden.device.type == "cpu" else GPU_CHUNK_LOGITS
        chunk_tokens = max(MIN_CHUNK_TOKENS, logits // weight.shape[0])
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, weights, chunk_tokens, z_loss, needs_gradient)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        chunk_tokens: int,
        z_loss: float,
        needs_gradient: bool,
    ) -> Tensor:
        matrix = weight.to(hidden.dtype)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        flat = hidden.reshape(-1, hidden.shape[-1])
        flat_targets, flat_weights = targets.reshape(-1, 1), weights.reshape(-1, 1).to(exact)
        hidden_grad = torch.empty_like(flat) if needs_gradient else None
        weight_grad: Tensor | None = None
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        for start in range(0, flat.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            rows, index, factors = flat[chunk], flat_targets[chunk], flat_weights[chunk]
            log_probs = torch.log_softmax(rows @ matrix.t(), dim=1, dtype=exact)
            picked = log_probs.gather(1, index)
            losses = -picked
            if z_loss:
                # log Z = (any one logit) - (its log probability)
                log_z = (rows * matrix[index[:, 0]]).sum(1, keepdim=True, dtype=exact) - picked
                losses = losses + z_loss * log_z.square()
            loss += (losses * factors).sum()
            if hidden_grad is None:
                continue
            logit_grad = log_probs.exp_()
            if z_loss:
                logit_grad *= 1 + 2 * z_loss * log_z
            logit_grad.scatter_add_(1, index, logit_grad.new_full((), -1.0).expand(index.shape))
            logit_grad = logit_grad.to(hidden.dtype)
            # The factors go to the narrow side of both products: W columns, not V.
            factors = factors.to(hidden.dtype)
            torch.mm(logit_grad, matrix, out=hidden_grad[chunk]).mul_(factors)
            scaled = rows * factors
            if weight_grad is None:
                weight_grad = (logit_grad.t() @ scaled).to(exact)
            elif hidden.dtype == exact:
                weight_grad.addmm_(logit_grad.t(), scaled)
            else:
                weight_grad += logit_grad.t() @ scaled
        ctx.gradients = (hidden_grad, weight_grad) if needs_gradient else None
        ctx.shapes = hidden.shape, weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the backward of chunked_cross_entropy can run once")
        hidden_grad, weight_grad = ctx.gradients
        ctx.gradients = None
        shape, weight_dtype = ctx.shapes
        hidden_grad = hidden_grad.mul_(grad).view(shape)
        weight_grad = None if weight_grad is None else weight_grad.mul_(grad).to(weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None, None
