"""Pipeline parallelism: each rank holds stages of consecutive blocks and sends its output to the rank of the next one.

torch.distributed.pipelining runs the schedules (`LayoutConfig.pp_schedule`); a model family defines how it is cut
(`contract.Staged`). Stages send only the residual stream. Every stage reads the same micro-batches, so it has their
tokens, weights and dropout keys. The first and the last stage each have a copy of a tied embedding. The gradients of
the copies are summed, and norms count the first copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from bigtrain.models.contract import Batch, LossSum, Stage
from bigtrain.models.sums import Sums
from bigtrain.parallel.config import PipelineSchedule
from bigtrain.parallel.context import ContextGroup


class Stages(nn.ModuleList):
    """The stages of a rank as one module, whose submodules have their names in the full model."""

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The modules of each stage in turn, without the stage's index in their names, and so of their parameters."""
        memo = set() if memo is None else memo
        for stage in self:
            yield from stage.named_modules(memo, prefix, remove_duplicate)


@dataclass(frozen=True)
class Cut:
    """A model cut into stages, on the meta device."""

    own: Stages
    """The stages of this rank."""

    shared: frozenset[str]
    """Names of parameters that the first and the last stage both hold."""

    names: tuple[str, ...]
    """Names of the parameters of all stages."""

    @classmethod
    def nothing(cls, whole: nn.Module) -> Cut:
        """The uncut model as a single stage."""
        return cls(Stages([whole]), frozenset(), tuple(dict(whole.named_parameters())))


def cut(whole: nn.Module, blocks: tuple[int, ...], pp: DeviceMesh) -> Cut:
    """Cut a model into stages, and return those of this rank.

    Args:
        whole: A `contract.Staged` on the meta device.
        blocks: Number of blocks of each stage, in order.
        pp: The pp axis of the mesh; its rank r holds stages r, r + pp, ...
    """
    ends = list(accumulate(blocks, initial=0))
    stages = [Stage(first, last, ends[-1]) for first, last in pairwise(ends)]

    def kept(stage: Stage) -> nn.Module:
        part: Any = copy.deepcopy(whole)
        part.keep(stage)
        return cast(nn.Module, part)

    first, last = (dict(kept(stage).named_parameters()).keys() for stage in (stages[0], stages[-1]))
    own = Stages(kept(stage) for stage in stages[pp.get_local_rank() :: pp.size()])
    return Cut(own, frozenset(first & last), tuple(dict(whole.named_parameters())))


class Pipeline:
    """Runs micro-batches through the stages of all ranks, with a schedule."""

    def __init__(
        self,
        stages: Stages,
        count: int,
        schedule: PipelineSchedule,
        pp: DeviceMesh,
        device: torch.device,
        context: ContextGroup | None = None,
    ) -> None:
        """Prepare this rank's stages for torch's schedules.

        Args:
            stages: This rank's stages.
            count: Number of stages on all ranks.
            pp: The pp axis of the mesh.
            context: The context-parallel group, which takes this rank's part of each micro-batch; None without it.
        """
        self._part = identity if context is None else context.part
        self._group, self._ranks = pp.get_group(), pp.size()
        self._count, self._schedule_name, self._device = count, schedule, device
        self._stages: dict[int, Any] = dict(enumerate_from(stages, pp.get_local_rank(), pp.size()))
        self._sums = Sums(device)
        self._schedules: dict[tuple[int, tuple[int, ...]], Any] = {}
        for stage in self._stages.values():
            self._take_part(stage)

    def backward(self, micro_batches: list[Batch]) -> Sums:
        """Run forward and backward of all micro-batches, which adds the gradient of the sum of losses to each `grad`.

        FSDP reduces gradients once, after the last micro-batch.

        Args:
            micro_batches: Micro-batches of one shape, the same on all stages.

        Returns:
            The sums over the micro-batches; zeros on ranks without the last stage.
        """
        batch = {name: torch.cat([part[name] for part in micro_batches]) for name in micro_batches[0]}
        self._sums = Sums.of(micro_batches, self._device)
        schedule = self.schedule(len(micro_batches), micro_batches[0])
        schedule.step(target=batch["weights"], losses=[], return_outputs=False, **batch)
        return self._sums

    @torch.no_grad()
    def forward(self, micro_batches: Iterable[Batch], sources: int = 0) -> Sums:
        """Run the forward pass alone, for any number of micro-batches of any shapes.

        Args:
            sources: Number of sources that the sums distinguish.

        Returns:
            The sums over the micro-batches; zeros on ranks without the last stage.
        """
        sending: dict[int, tuple[dist.Work | None, Tensor]] = {}
        self._sums = Sums(self._device, sources)
        for batch in micro_batches:
            for index, stage in self._stages.items():
                received = []
                if index > 0:
                    shape = stage.stream_shape(self._part(batch))
                    received.append(torch.empty(shape, dtype=stage.compute_dtype, device=self._device))
                    dist.recv(received[0], src=self._rank_of(index - 1), group=self._group)
                result = stage(*received, **batch)
                if index == self._count - 1:
                    continue
                _wait(sending.pop(index, None))
                sending[index] = dist.isend(result, dst=self._rank_of(index + 1), group=self._group), result
        for sent in sending.values():
            _wait(sent)
        return self._sums

    def schedule(self, n_micro: int, micro_batch: Batch) -> Any:
        """torch's schedule for a number of micro-batches of one shape; schedules are cached.

        Args:
            n_micro: Number of micro-batches.
            micro_batch: One of them, which gives the shape.
        """
        any_stage = next(iter(self._stages.values()))
        shape = tuple(any_stage.stream_shape(self._part(micro_batch)))
        if (n_micro, shape) not in self._schedules:
            self._schedules[n_micro, shape] = self._new_schedule(n_micro, shape, any_stage.compute_dtype)
        return self._schedules[n_micro, shape]

    def _new_schedule(self, n_micro: int, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        # With known shapes, torch need not run the stages once to infer them.
        stream = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                stage,
                index,
                self._count,
                self._device,
                input_args=(stream,) if index else (),
                output_args=(loss if index == self._count - 1 else stream,),
                group=self._group,
            )
            for index, stage in self._stages.items()
        ]
        # The engine needs sums; with scale_grads torch would divide gradients by the number of micro-batches.
        options: dict[str, Any] = {"n_microbatches": n_micro, "loss_fn": _the_loss, "scale_grads": False}
        if self._schedule_name == "1f1b":
            return Schedule1F1B(stages[0], **options)
        if self._schedule_name == "interleaved":
            return ScheduleInterleaved1F1B(cast(Any, stages), **options)
        return ScheduleInterleavedZeroBubble(cast(Any, stages), **options)

    def _take_part(self, stage: Any) -> None:
        """Replace a stage's `forward` by one for torch's schedules: the stream is its argument, the batch keywords."""

        def forward(*received: Tensor, **batch: Tensor) -> Tensor:
            result = stage.forward_stage(received[0] if received else None, self._part(batch))
            if not isinstance(result, LossSum):
                # Even if all parameters so far are frozen, torch's schedules need a tensor that requires a gradient.
                frozen = torch.is_grad_enabled() and not cast(Tensor, result).requires_grad
                return cast(Tensor, result).requires_grad_() if frozen else cast(Tensor, result)
            self._sums.add(result, batch)
            return result.loss

        stage.forward = forward

    def _rank_of(self, stage: int) -> int:
        return dist.get_global_rank(self._group, stage % self._ranks)


def identity(batch: Batch) -> Batch:
    """The batch itself: without context parallelism a rank's part is the full batch."""
    return batch


def enumerate_from(stages: Iterable[nn.Module], first: int, step: int) -> Iterator[tuple[int, nn.Module]]:
    """A rank's stages, each with its index among all stages: `first`, `first` + `step`, ..."""
    for place, stage in enumerate(stages):
        yield first + place * step, stage


def ends_group(pp: DeviceMesh, world: DeviceMesh) -> dist.ProcessGroup | None:
    """The group of this pipeline's first and last rank; None on the ranks between them. Collective over all ranks.

    Args:
        pp: The pp axis of the mesh.
        world: The mesh of all ranks, of which `pp` is the outermost axis.
    """
    if pp.size() == 2:
        return pp.get_group()
    ranks = world.mesh.reshape(pp.size(), -1)
    pairs = [[int(first), int(last)] for first, last in zip(ranks[0], ranks[-1], strict=True)]
    group, _ = dist.new_subgroups_by_enumeration(pairs)
    return group if pp.get_local_rank() in (0, pp.size() - 1) else None


def _the_loss(output: Tensor, target: Tensor) -> Tensor:
    return output


def _wait(sent: tuple[dist.Work | None, Tensor] | None) -> None:
    """Wait until a tensor is sent; the caller's reference keeps its memory until then."""
    if sent is not None and sent[0] is not None:
        sent[0].wait()
