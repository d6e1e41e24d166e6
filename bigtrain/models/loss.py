"""Cross-entropy over a large vocabulary that never materialises all logits."""

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
    """The rows of a head that this rank holds, if a tensor-parallel group splits the vocabulary."""

    group: dist.ProcessGroup
    first_row: int

    def log_softmax(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The log softmax over the vocabulary of all ranks. Collective.

        Args:
            logits: (T, V), logits of this rank's rows; overwritten.
            targets: int64 (T, 1), indices in the full vocabulary.

        Returns:
            The log probabilities of this rank's rows, (T, V). Then four tensors (T, 1): the target's log probability;
            the target's index among this rank's rows (arbitrary if another rank holds it); 1 if this rank holds the
            target, else 0; and the largest log probability over the full vocabulary.
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
        return logits, sums[:, 1:] - log_total, own, hits, -log_total


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    chunk_tokens: int | None = None,
    part: VocabularyPart | None = None,
    tp: TensorParallel = "copy",
) -> tuple[Tensor, Tensor]:
    """The weighted sum of cross-entropies of `targets` under the logits `hidden @ weight.T`, in nats.

    The logits exist for one chunk of tokens at a time. If gradients are needed, the forward pass computes them, chunk
    by chunk. So no logits are stored, and the number of matmuls stays 3, as in the plain form. Matmuls run in the dtype
    of `hidden`; softmax, loss and sums over chunks are in FP32, or FP64 for FP64. If the metric `accuracy` is
    requested, it is recorded: the share of tokens whose target has the largest logit.

    Args:
        hidden: (..., W).
        weight: (V, W), in any dtype.
        targets: int64 (...), each in [0, V), even where the weight is 0.
        weights: (...), the factor of each token's loss.
        chunk_tokens: Number of tokens of one chunk; None: chosen by device and V.
        part: If ranks split the head, the rows that `weight` holds; `targets` are then indices in the full vocabulary.
        tp: "copy" if all ranks of a tensor-parallel group get the same tokens, "part" if each gets its own part.

    Returns:
        The sum, a scalar in FP32 (FP64 for FP64), equal on all ranks; and the losses that it sums, (...), without
        gradient. Each gradient can be computed only once, but both in separate backward passes, as pipeline schedules
        do. With `part`, the gradient of `weight` is that of this rank's rows. The gradient of `hidden` is then a
        partial one: its sum over the ranks is the gradient.
    """
    if chunk_tokens is None:
        chunk_tokens = chunks.chunk_tokens(weight.shape[0], hidden.device.type == "cpu")
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    right = torch.empty(targets.numel(), device=hidden.device) if wants_metric("accuracy") else None
    options = chunk_tokens, part, needs_gradient, right
    # Views, because autograd does not report whether a backward pass needs the gradient of a leaf.
    views = hidden.view_as(hidden), weight.view_as(weight)
    loss, losses = _ChunkedCrossEntropy.apply(*views, targets, weights, *options)
    if right is not None:
        record_metric("accuracy", right.view(targets.shape), weight=weights, tp=tp)
    return loss, losses


def class_losses(logits: Tensor, batch: Batch) -> Tensor:
    """The cross-entropy of each sample, FP32 (B,), in nats.

    If the metric `accuracy` is requested, it is recorded: the share of samples whose class has the largest logit.

    Args:
        logits: (B, classes).
        batch: Has `weights` (B,) and `labels`: int64 (B,), or class probabilities (B, classes) for mixed images.
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
            else:
                log_probs, picked, index, hits, top = part.log_softmax((rows @ matrix.t()).to(exact), index)
            if right is not None:
                best = log_probs.amax(dim=1, keepdim=True) if part is None else top
                right[chunk] = (picked >= best)[:, 0]
            losses = -picked * factors
            of_tokens[chunk] = losses[:, 0]
            loss += losses.sum()
            if hidden_grad is None:
                continue
            logit_grad = log_probs.exp_()
            logit_grad.scatter_add_(1, index, -hits)
            logit_grad = logit_grad.to(hidden.dtype)
            # The factors multiply the narrow operand of both products: W columns, not V.
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
        return hidden_grad, weight_grad, None, None, None, None, None, None


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right, in `dtype`; `total` may be changed in place."""
    if total is None:
        return (left @ right).to(dtype)
    if left.dtype == dtype:
        return total.addmm_(left, right)
    total += left @ right
    return total


def _handed_over(ctx: Any, place: int, grad: Tensor) -> Tensor | None:
    """A stored input gradient, multiplied by `grad` in place; None if this backward pass does not need it."""
    node = ctx.next_functions[place][0]
    if node is None or not torch._C._will_engine_execute_node(node):
        return None
    if ctx.gradients[place] is None:
        raise RuntimeError("chunked_cross_entropy gives each gradient once")
    gradient: Tensor = ctx.gradients[place]
    ctx.gradients[place] = None
    return gradient.mul_(grad)
