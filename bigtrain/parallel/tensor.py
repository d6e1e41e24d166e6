"""Tensor parallelism: each rank holds a part of every large matrix, and all ranks compute the same sequences.

A model family's plan gives the role of each parameter (`models.config.TensorRole`). In each pair of matmuls, the first
matrix is split by columns and the second one by rows (Shoeybi et al. 2019). Between pairs, under sequence parallelism,
each rank holds a slice of the sequence (Korthikanti et al. 2022):

    slice of the sequence --enter--> full sequence, own heads or channels --leave--> slice of the sequence
                        all-gather                                     reduce-scatter

Without sequence parallelism, `enter` does nothing in the forward pass and `leave` is an all-reduce. Modules compute on
local tensors, and `split` gives them the functions that communicate. So a parameter may be a DTensor, whose global
shape FSDP2 and checkpoints see, or a plain tensor for engines that do not support DTensors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from bigtrain.models.config import TensorRole
from bigtrain.models.init import Part
from bigtrain.models.layers import Branch, Embedding, Linear
from bigtrain.models.loss import VocabularyPart, chunked_cross_entropy
from bigtrain.parallel.collectives import all_gather, reduce_scatter

logger = logging.getLogger(__name__)

SPLIT_DIM: dict[TensorRole, int] = {"column": 0, "vocab": 0, "row": 1}
"""The dimension in which a parameter is split, by role. Parameters of other roles are full on each rank."""


@dataclass(frozen=True)
class TensorGroup:
    """The tensor-parallel group, and its communication in forward and backward."""

    group: dist.ProcessGroup
    sequence_parallel: bool
    loss_parallel: bool

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This rank's index in the group."""
        return self.group.rank()

    def enter(self, x: Tensor) -> Tensor:
        """The full sequence (B, C, ...), as input of a column-split matmul. Its gradient is summed over the ranks."""
        if self.sequence_parallel:
            return cast(Tensor, _Gather.apply(x, self.group))
        return cast(Tensor, _SumGradient.apply(x, self.group))

    def leave(self, x: Tensor) -> Tensor:
        """The sum over the ranks of the partial results (B, C, ...) of a row-split matmul.

        Under sequence parallelism the result is this rank's slice of the sum, (B, C / tp, ...).
        """
        if self.sequence_parallel:
            return cast(Tensor, _SumAndScatter.apply(x, self.group))
        return cast(Tensor, _Sum.apply(x, self.group))

    def positions(self, count: int) -> slice:
        """The positions of a sequence of `count` tokens that this rank's residual stream holds.

        Raises:
            ValueError: `count` is not a multiple of the number of ranks.
        """
        if not self.sequence_parallel:
            return slice(0, count)
        if count % self.size:
            raise ValueError(f"sequence parallelism over {self.size} ranks cannot divide {count} positions")
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def loss(self, hidden: Tensor, head: Tensor, rows: int, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """`loss.chunked_cross_entropy` of the full sequence, equal on all ranks.

        Args:
            hidden: The residual stream: the full sequence, or this rank's slice under sequence parallelism.
            head: This rank's rows of the head.
            rows: Number of rows of the full head.
            targets, weights: Targets and weights of the full sequence, (B, C).
        """
        if self.loss_parallel:
            part = VocabularyPart(self.group, chunk(rows, self.size, self.rank).start)
            return chunked_cross_entropy(self.enter(hidden), head, targets, weights, part=part)
        whole = cast(Tensor, _GatherRows.apply(head, rows, self.group, self.sequence_parallel))
        if not self.sequence_parallel:
            return chunked_cross_entropy(hidden, whole, targets, weights)
        mine = self.positions(targets.shape[1])
        loss, losses = chunked_cross_entropy(hidden, whole, targets[:, mine], weights[:, mine], tp="part")
        # One all-reduce for both.
        summed = cast(Tensor, _Sum.apply(torch.cat((loss.view(1), losses.sum(dim=1))), self.group))
        # Pipeline schedules detach the loss in place, which a view does not allow.
        return summed[0].clone(), summed[1:].detach()

    def logits(self, hidden: Tensor, head: Tensor, rows: int) -> Tensor:
        """hidden @ head.T (B, C, rows) of the full sequence, equal on all ranks; for inference."""
        part = self.enter(hidden) @ head.to(hidden.dtype).t()
        return _gather_rows(part.movedim(-1, 0), rows, self.group).movedim(0, -1)


@dataclass(frozen=True)
class Split:
    """How the parameters of a tensor-parallel model are split."""

    parts: dict[str, Part]
    """This rank's part of each parameter that is split, by name; other parameters are full."""

    partial: frozenset[str]
    """Names of full parameters that each rank applies to a part of the activations; their gradients must be summed over
    the ranks."""


def split(model: nn.Module, tensor: TensorGroup, mesh: DeviceMesh | None) -> Split:
    """Replace a model's parameters by this rank's parts, and set the communication of its modules, in place.

    Args:
        model: A model on the meta device, with a `tensor_plan`.
        tensor: The tensor-parallel group.
        mesh: The tp axis, on which parameters become DTensors. None: they become plain tensors of the part's shape.

    Raises:
        ValueError: The plan lacks a parameter, or a split dimension is too small to give each rank an entry.
    """
    plan = cast(Any, model).tensor_plan()
    parts: dict[str, Part] = {}
    partial: set[str] = set()
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for own_name, parameter in list(module.named_parameters(recurse=False)):
            name = f"{module_name}.{own_name}" if module_name else own_name
            if parameter in replaced:
                setattr(module, own_name, replaced[parameter])
                continue
            role = _role(plan, name)
            if role == "heads" or (role == "whole" and tensor.sequence_parallel):
                partial.add(name)
            dim = SPLIT_DIM.get(role)
            if dim is not None:
                parts[name] = _part(parameter, dim, tensor, name)
            stored = _store(parameter, dim, parts.get(name), mesh)
            replaced[parameter] = stored
            setattr(module, own_name, stored)
            if role == "row" and isinstance(module, Linear) and own_name == "weight":
                module.leave = tensor.leave
            if role == "vocab" and isinstance(module, Embedding):
                module.first_row, module.leave = parts[name].offset[0], tensor.leave
        if isinstance(module, Branch):
            module.enter = tensor.enter
    cast(Any, model).tensor = tensor
    return Split(parts, frozenset(partial))


def sum_gradients(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum partial gradients over a group, in place, in one collective."""
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    sums = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [total.view_as(to) for total, to in zip(sums, gradients, strict=True)])


def sum_gradients_as_they_come(model: nn.Module, partial: Iterable[str], group: dist.ProcessGroup) -> None:
    """Register hooks that sum each partial gradient over a group during the backward pass.

    This is for engines whose library reduces gradients itself.

    Args:
        partial: Names of the parameters.
    """

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=group)
        return total

    parameters = dict(model.named_parameters())
    for name in sorted(partial):
        parameters[name].register_hook(summed)


def chunk(count: int, ranks: int, rank: int) -> slice:
    """A rank's slice of `count` entries, split as by `torch.chunk` and `Shard`: the last ranks may have fewer."""
    share = -(-count // ranks)
    return slice(min(rank * share, count), min((rank + 1) * share, count))


def _role(plan: dict[str, TensorRole], name: str) -> TensorRole:
    for pattern, role in plan.items():
        if fnmatchcase(name, pattern):
            return _today(role)
    raise ValueError(f"the tensor plan has no pattern that matches {name}")


@cache
def _today(role: str) -> TensorRole:
    """The current name of a role. Models for earlier versions have the role "sequence" instead of "whole"."""
    if role == "sequence":
        logger.warning('the tensor plan has the role "sequence", which is now called "whole"')
        return "whole"
    return cast(TensorRole, role)


def _part(parameter: Tensor, dim: int, tensor: TensorGroup, name: str) -> Part:
    mine = chunk(parameter.shape[dim], tensor.size, tensor.rank)
    if chunk(parameter.shape[dim], tensor.size, tensor.size - 1).start >= parameter.shape[dim]:
        raise ValueError(f"{name} has {parameter.shape[dim]} entries to split: too few for {tensor.size} ranks")
    offset = tuple(mine.start if at == dim else 0 for at in range(parameter.ndim))
    shape = tuple(mine.stop - mine.start if at == dim else size for at, size in enumerate(parameter.shape))
    return Part(tuple(parameter.shape), offset, shape)


def _store(parameter: nn.Parameter, dim: int | None, part: Part | None, mesh: DeviceMesh | None) -> nn.Parameter:
    """This rank's part of a parameter, not yet initialised."""
    values = parameter.detach() if part is None else parameter.new_empty(part.local_shape)
    if mesh is not None:
        placement: Placement = Replicate() if dim is None else Shard(dim)
        values = DTensor.from_local(
            values, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather along the sequence: (B, C / tp, ...) of each rank -> (B, C, ...)."""
    parts = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    all_gather(parts, x.contiguous(), group=group)
    return parts.unflatten(0, (group.size(), -1)).movedim(0, 1).flatten(1, 2)


def _sum_and_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Reduce-scatter along the sequence: (B, C, ...) of each rank -> this rank's slice (B, C / tp, ...) of the sum."""
    parts = x.unflatten(1, (group.size(), -1)).movedim(1, 0).contiguous()
    mine = torch.empty_like(parts[0])
    reduce_scatter(mine, parts.flatten(0, 1), group=group)
    return mine


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # A copy is summed, because autograd may have saved x.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    missing = rows - x.shape[0]
    return torch.cat((x, x.new_zeros((missing, *x.shape[1:])))) if missing else x.contiguous()


def _gather_rows(x: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    """All-gather of rows: each rank's part as split by `chunk`, (own rows, ...) -> (rows, ...)."""
    share = -(-rows // group.size())
    whole = x.new_empty((group.size() * share, *x.shape[1:]))
    all_gather(whole, _pad_rows(x, share), group=group)
    return whole[:rows]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_and_scatter(grad, ctx.group), None


class _SumAndScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum_and_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, group: dist.ProcessGroup, partial: bool) -> Tensor:
        ctx.rows, ctx.own_rows, ctx.group, ctx.partial = rows, x.shape[0], group, partial
        return _gather_rows(x, rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """This rank's rows of the gradient, which is summed over the ranks if each rank saw only its own tokens.

        Otherwise all ranks have the same gradient already.
        """
        size = ctx.group.size()
        if not ctx.partial:
            return grad[chunk(ctx.rows, size, ctx.group.rank())].contiguous(), None, None, None
        share = -(-ctx.rows // size)
        mine = grad.new_empty((share, *grad.shape[1:]))
        reduce_scatter(mine, _pad_rows(grad, size * share), group=ctx.group)
        return mine[: ctx.own_rows], None, None, None
