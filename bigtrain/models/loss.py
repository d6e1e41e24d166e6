"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bigtrain.metrics import TensorParallel, record_metric, wants_metric
from bigtrain.models import chunks
from bigtrain.models.contract import Batch


@dataclass(frozen=True)
class VocabularyPart:
    """The rows of a head that lie on this rank, where the ranks of a group share them."""

    group: dist.ProcessGroup
    first_row: int

    def log_softmax(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The softmax over the rows of all ranks.

        Args:
            logits: (T, V), of this rank's rows; overwritten.
            targets: int64 (T, 1), among the rows of all ranks.

        Returns:
            The log probabilities of this rank's rows (T, V); then, each (T, 1): that of the target, log Z, the target's
            row on this rank (any, where it lies elsewhere), 1 where it lies here, 0 elsewhere, and the largest log
            probability over the rows of all ranks.
        """
        highest = logits.amax(dim=1, keepdim=True)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        own = targets - self.first_row
        here = (own >= 0) & (own < logits.shape[1])
        own = own.masked_fill(~here, 0)
        hits = here.to(logits.dtype)
        logits -= highest
        sums = torch.cat((logits.exp().sum(dim=1, keepdim=True), logits.gather(1, own) * hits), dim=1)
        dist.all_reduce(sums, group=self.group)
        log_total = sums[:, :1].log()
        logits -= log_total
        return logits, sums[:, 1:] - log_total, log_total + highest, own, hits, -log_total


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
    part: VocabularyPart | None = None,
    tp: TensorParallel = "copy",
) -> tuple[Tensor, Tensor]:
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
        part: Which rows of a larger matrix `weight` is, where ranks share it; `targets` count in the larger one.
        tp: Whether the ranks of a tensor-parallel group are given the same tokens or each its part of them.

    Where the metric `accuracy` is requested, it is recorded: the share of tokens whose target has the largest logit.

    Returns:
        The sum, a scalar in FP32 (FP64 for FP64), equal on all ranks, and what it sums (...), which has no gradient.
        Each gradient of the sum can be had once, in one backward pass or in two, as schedules of pipelines have it:
        this rank's rows of that of `weight`, and for `hidden` what these rows add to it: the sum over the ranks is the
        gradient.
    """
    if chunk_tokens is None:
        chunk_tokens = chunks.chunk_tokens(weight.shape[0], hidden.device.type == "cpu")
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    right = torch.empty(targets.numel(), device=hidden.device) if wants_metric("accuracy") else None
    options = chunk_tokens, z_loss, part, needs_gradient, right
    # Views, since autograd does not tell whether a backward pass needs a leaf's gradient.
    views = hidden.view_as(hidden), weight.view_as(weight)
    loss, losses = _ChunkedCrossEntropy.apply(*views, targets, weights, *options)
    if right is not None:
        record_metric("accuracy", right.view(targets.shape), weight=weights, tp=tp)
    return loss, losses


def class_losses(logits: Tensor, batch: Batch) -> Tensor:
    """The cross-entropy of each sample, FP32 (B,), in nats.

    Args:
        logits: (B, classes).
        batch: Holds `labels`: int64 (B,), or class probabilities (B, classes) where images are mixed; `weights` (B,).

    Where the metric `accuracy` is requested, it is recorded: the share of samples whose class has the largest logit.
    """
    labels = batch["labels"]
    if wants_metric("accuracy"):
        right = logits.argmax(dim=1) == (labels if labels.ndim == 1 else labels.argmax(dim=1))
        record_metric("accuracy", right.float(), weight=batch["weights"])
    return F.cross_entropy(logits.float(), labels, reduction="none")


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
        part: VocabularyPart | None,
        needs_gradient: bool,
        right: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        matrix = weight.to(hidden.dtype)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        flat = hidden.reshape(-1, hidden.shape[-1])
        flat_targets, flat_weights = targets.reshape(-1, 1), weights.reshape(-1, 1).to(exact)
        hidden_grad = torch.empty_like(flat) if needs_gradient else None
        weight_grad: Tensor | None = None
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        of_tokens = torch.empty(flat.shape[0], dtype=exact, device=hidden.device)
        for start in range(0, flat.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            rows, index, factors = flat[chunk], flat_targets[chunk], flat_weights[chunk]
            if part is None:
                log_probs = torch.log_softmax(rows @ matrix.t(), dim=1, dtype=exact)
                picked, hits = log_probs.gather(1, index), log_probs.new_ones(()).expand(index.shape)
                if z_loss:
                    # log Z = (any one logit) - (its log probability)
                    log_z = (rows * matrix[index[:, 0]]).sum(1, keepdim=True, dtype=exact) - picked
            else:
                log_probs, picked, log_z, index, hits, top = part.log_softmax((rows @ matrix.t()).to(exact), index)
            if right is not None:
                best = log_probs.amax(dim=1, keepdim=True) if part is None else top
                right[chunk] = (picked >= best)[:, 0]
            losses = -picked
            if z_loss:
                losses = losses + z_loss * log_z.square()
            losses = losses * factors
            of_tokens[chunk] = losses[:, 0]
            loss += losses.sum()
            if hidden_grad is None:
                continue
            logit_grad = log_probs.exp_()
            if z_loss:
                logit_grad *= 1 + 2 * z_loss * log_z
            logit_grad.scatter_add_(1, index, -hits)
            logit_grad = logit_grad.to(hidden.dtype)
            # The factors go to the narrow side of both products: W columns, not V.
            factors = factors.to(hidden.dtype)
            torch.mm(logit_grad, matrix, out=hidden_grad[chunk]).mul_(factors)
            scaled = rows * factors
            weight_grad = _add_product(weight_grad, logit_grad.t(), scaled, exact)
        ctx.gradients = [hidden_grad, weight_grad]
        ctx.shapes = hidden.shape, weight.dtype
        of_tokens = of_tokens.view(targets.shape)
        ctx.mark_non_differentiable(of_tokens)
        return loss, of_tokens

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        shape, weight_dtype = ctx.shapes
        hidden_grad, weight_grad = (_handed_over(ctx, place, grad) for place in range(2))
        if hidden_grad is not None:
            hidden_grad = hidden_grad.view(shape)
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None, None, None, None


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right, in `dtype`; the total may be changed in place."""
    if total is None:
        return (left @ right).to(dtype)
    if left.dtype == dtype:
        return total.addmm_(left, right)
    total += left @ right
    return total


def _handed_over(ctx: Any, place: int, grad: Tensor) -> Tensor | None:
    """A gradient of the inputs times `grad`, in place; None where this backward pass does not need it."""
    node = ctx.next_functions[place][0]
    if node is None or not torch._C._will_engine_execute_node(node):
        return None
    if ctx.gradients[place] is None:
        raise RuntimeError("chunked_cross_entropy gives each gradient once")
    gradient: Tensor = ctx.gradients[place]
    ctx.gradients[place] = None
    return gradient.mul_(grad)
