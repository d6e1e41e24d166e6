"""Operations that couple the sequences of the global batch: sums and gathers over ranks, and batch statistics.

    from bigtrain.models.plain import gather_batch

    images, _ = gather_batch(F.normalize(image_features))             # (all rows of the global batch, W), with gradient
    texts, first = gather_batch(F.normalize(text_features))
    own = first + torch.arange(len(text_features), device=texts.device)
    losses = F.cross_entropy(scale * text_features @ images.T, own, reduction="none")     # of this rank's rows

In a single process they return their input. A module that uses one of them, or BatchNorm, needs each rank's part of the
global batch in one forward pass; the engine refuses more than one micro-batch per step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bigtrain.config import UserError
from bigtrain.models.plain.modes import StaysOn


class BatchRanks(Protocol):
    """The ranks that share a global batch, during one forward pass."""

    rank: int
    rows: list[int]
    """Number of sequences of each rank, without fillers."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, with gradient. Collective."""
        ...


class OneProcess:
    """A `BatchRanks` of one process, which has the full global batch."""

    rank = 0

    def __init__(self, rows: int) -> None:
        self.rows = [rows]

    def sum(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


class _Sum(torch.autograd.Function):
    """All-reduce with gradient: all ranks use the sum, so its gradient is the sum of their gradients."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


class AllRanks:
    """A `BatchRanks` of all ranks of the process group, since plain modules support only data parallelism."""

    def __init__(self, rows: int, device: torch.device) -> None:
        """Exchange the number of rows of each rank. Collective."""
        self.rank = dist.get_rank()
        counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
        counts[self.rank] = rows
        dist.all_reduce(counts)
        self.rows = counts.tolist()

    def sum(self, x: Tensor) -> Tensor:
        """See `BatchRanks.sum`."""
        return _Sum.apply(x)


def differing_uses() -> UserError:
    """The error that passes use this module's operations differently often, for which ranks would wait forever."""
    return UserError(
        "Whether BatchNorm, gather_batch() or sum_over_batch() runs depends on the data: ranks would wait for others",
        "forward()",
        "Run it in every pass, also with no rows; or use LayerNorm there.",
    )


class _Local(threading.local):
    ranks: BatchRanks | None = None
    own: int = 0
    """Number of rows in the batch of this pass, fillers included."""
    passes: int = 1
    uses = 0
    """How often this pass has coupled sequences."""


_here = _Local()


@contextmanager
def across(ranks: BatchRanks, batch: int, passes: int = 1) -> Iterator[None]:
    """A context in which a forward pass sums over `ranks`.

    Args:
        batch: Number of rows in the batch of the pass, fillers included.
        passes: Number of forward passes of the step.
    """
    _here.ranks, _here.own, _here.passes, _here.uses = ranks, batch, passes, 0
    # Set the defaults of other threads too: on a GPU, autograd recomputes activations in a thread of its own.
    _Local.ranks, _Local.own, _Local.passes = ranks, batch, passes
    try:
        with _BatchNorm():
            yield
    finally:
        _here.ranks = _Local.ranks = None


def couples() -> int:
    """How often the last pass of this thread has used one of this module's operations."""
    return _here.uses


def _use(what: str) -> None:
    """Record that the pass couples sequences.

    Args:
        what: Name of the operation, for messages.

    Raises:
        UserError: The step has several passes, so no pass sees the global batch.
    """
    _here.uses += 1
    if _here.passes > 1:
        raise UserError(
            f"{what} needs each rank's part of a batch in one pass, but a step has {_here.passes} passes",
            "layout.micro_size",
            f"Set layout.micro_size to {_here.passes * _here.own} or more, or remove it; or use more ranks.",
        )


def real_rows(batch: int) -> int:
    """Number of sequences of this pass that are no fillers; fillers come last.

    Args:
        batch: Number of sequences of this pass, fillers included.
    """
    return batch if _here.ranks is None else _here.ranks.rows[_here.ranks.rank]


def sum_over_batch(x: Tensor, what: str = "sum_over_batch()") -> Tensor:
    """The sum of x over all ranks, with gradient. Collective.

    Args:
        x: A sum over this rank's part of the global batch.
        what: Name of the caller, for messages.
    """
    _use(what)
    return x if _here.ranks is None else _here.ranks.sum(x)


def gather_batch(x: Tensor) -> tuple[Tensor, int]:
    """The rows of all ranks, with gradient, and the index of this rank's first row among them. Collective.

    Args:
        x: (B, ...), one row for each sequence of this rank's batch. Rows of fillers are dropped.

    Raises:
        UserError: x has another number of rows than the batch has sequences.
    """
    _use("gather_batch()")
    ranks = _here.ranks
    if ranks is not None and len(x) != _here.own:
        raise UserError(
            f"gather_batch() got {len(x)} rows for the {_here.own} sequences of a batch",
            "forward()",
            "Pass one row for each sequence; with several views, call it once for each view.",
        )
    if ranks is None or len(ranks.rows) == 1:
        return x, 0
    first, own = sum(ranks.rows[: ranks.rank]), ranks.rows[ranks.rank]
    everything = x.new_zeros((sum(ranks.rows), *x.shape[1:]))
    everything = torch.cat([everything[:first], x[:own], everything[first + own :]])
    # A rank with only a filler uses the index of the last row, so that its targets exist.
    return ranks.sum(everything), min(first, len(everything) - 1)


class _BatchNorm(StaysOn):
    """Makes BatchNorm and InstanceNorm compute their statistics over the global batch."""

    def call(self, function: Any, args: Any, kwargs: Any) -> Any:
        """See `StaysOn.call`."""
        if function is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if function is F.instance_norm:
            return _instance_norm(*args, **kwargs)
        return function(*args, **kwargs)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`, in training with mean and variance over the rows of all ranks, without fillers."""
    ranks = _here.ranks
    if training:
        _use("BatchNorm")
    if not training or ranks is None or (len(ranks.rows) == 1 and ranks.rows[0] == _here.own):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    # A pass contains a filler only if the rank has no sequence. Rows are counted in x, since their number may depend on
    # the data.
    own = x.shape[0] if ranks.rows[ranks.rank] else 0
    dims = [dim for dim in range(x.ndim) if dim != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    values = x.float()
    number = values.new_full((1,), own * math.prod(x.shape[2:]))
    mean, count = ranks.sum(torch.cat([values[:own].sum(dims), number])).split([x.shape[1], 1])
    if sum(ranks.rows) < 2 and float(count) < 2:
        raise UserError(
            "BatchNorm cannot compute a variance: the global batch has one value for each channel",
            "batch.size",
            "Set batch.size to 2 or more.",
        )
    mean = mean / count
    centred = values - mean.view(shape)
    var = ranks.sum(centred[:own].square().sum(dims)) / count
    result = centred * torch.rsqrt(var + eps).view(shape)
    if weight is not None:
        result = result * weight.view(shape)
    if bias is not None:
        result = result + bias.view(shape)
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return result.to(x.dtype)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.instance_norm`, with running statistics updated by the mean over the sequences of all ranks."""
    if not use_input_stats or running_mean is None or running_var is None or _here.ranks is None:
        return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    _use("InstanceNorm with running statistics")
    with torch.no_grad():
        var, mean = torch.var_mean(x.float()[: _here.ranks.rows[_here.ranks.rank]].flatten(2), 2)
        both = _here.ranks.sum(torch.stack([mean.sum(0), var.sum(0)])) / sum(_here.ranks.rows)
        running_mean.lerp_(both[0].to(running_mean.dtype), momentum)
        running_var.lerp_(both[1].to(running_var.dtype), momentum)
    return F.instance_norm(x, None, None, weight, bias, use_input_stats, momentum, eps)
