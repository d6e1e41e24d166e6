"""The vector that the ranks sum once a step: which named slots it has, and what each holds afterwards.

    square, votes, unknown, loss, weight     one entry each, always
    sources                                  loss and weight of each source of a mixture
    metrics                                  what was recorded by name: two entries for each sum, mean and norm,
                                             one for each rank of an extremum, so that the sum gathers them

All ranks know the same metrics in the same order. A rank that records a new one says so in `unknown`; in the first step
the ranks then exchange names and reduce again, later when the trainer lets them (`agree`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.config import UserError
from bigtrain.engines.contract import StepResult, Totals
from bigtrain.metrics import Metric, Recorder
from bigtrain.models.sums import Sums
from bigtrain.parallel.config import Mesh


@dataclass(frozen=True)
class Slots:
    """Where each named part of a vector lies."""

    sizes: Mapping[str, int]

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One float64 vector of all parts, in the order of `sizes`."""
        return torch.cat([parts[name].view(-1) for name in self.sizes])

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts, as views."""
        return dict(zip(self.sizes, vector.split(list(self.sizes.values())), strict=True))


class Reduced:
    """What a step sums, over all ranks; tensors on the device."""

    def __init__(self, parts: Mapping[str, Tensor], metrics: Sequence[Metric]) -> None:
        self._parts = dict(parts)
        self._metrics = tuple(metrics)
        self.square, self.votes, self.unknown, self.loss, self.weight = (
            parts[name].view(()) for name in ("square", "votes", "unknown", "loss", "weight")
        )

    @property
    def safe_weight(self) -> Tensor:
        """The sum of weights to divide by: 1 where no token counts."""
        return torch.where(self.weight == 0, torch.ones_like(self.weight), self.weight)

    def bad(self, *finite: Tensor) -> Tensor:
        """Whether the step must update nothing: one of the values, or the loss, is not finite, or no token counts."""
        good = torch.isfinite(self.loss) & (self.weight != 0)
        for value in finite:
            good = good & torch.isfinite(value)
        return ~good

    def result(self, norm: Tensor, bad: Tensor, loss_scale: Tensor | None = None) -> StepResult:
        """The numbers of the step; `loss_scale`: what loss and weight are to be divided by."""
        loss, weight, sources = self.loss, self.weight, self._parts["sources"]
        scale = torch.zeros_like(loss) if loss_scale is None else loss_scale
        if loss_scale is not None:
            loss, weight, sources = loss / loss_scale, weight / loss_scale, sources / loss_scale
        numbers = [loss, weight, norm, self.votes, self.unknown, bad.double(), scale]
        metrics = [self._pair(metric) for metric in self._metrics]
        return StepResult(torch.cat([torch.stack(numbers), sources, *metrics]), self._metrics)

    def _pair(self, metric: Metric) -> Tensor:
        """(2,): a metric's value and weight."""
        part = self._parts[_key(metric)]
        if not metric.is_extremum:
            return part
        best = part.amax() if metric.reduction == "max" else part.amin()
        return torch.stack([best, (best != metric.neutral).double()])


class StepReducer:
    """What one rank's engine needs to reduce its steps and evaluations.

    Args:
        device: Device of the sums.
        rank, world_size: This rank among all.
        sizes: The axes over all ranks, which distinguish replicas from shards.
        stream_is_part: Whether tensor-parallel ranks share the residual stream.
    """

    def __init__(
        self, device: torch.device, rank: int = 0, world_size: int = 1, sizes: Mesh | None = None,
        stream_is_part: bool = False,
    ) -> None:  # fmt: skip
        sizes = sizes or Mesh()
        tensor_rank = sizes.coordinates(rank)["tp"] if sizes.tp > 1 else 0
        self.recorder = Recorder(device, tensor_rank, stream_is_part)
        self._evaluating = Recorder(device, tensor_rank, stream_is_part)
        self._counts_loss = sizes.counts_loss(rank) if sizes.world_size == world_size else True
        self._device, self._rank, self._world_size = device, rank, world_size
        self._metrics: dict[str, Metric] = {}
        self._evaluated: dict[str, Metric] = {}
        self._is_first = True

    def reduce(self, square: Tensor, vote: float, sums: Sums) -> Reduced:
        """Sum over the ranks what a step adds up, in one all-reduce.

        Args:
            square: float64 scalar, this rank's part of the square of the gradient's norm.
            vote: This rank's.
            sums: Of its micro-batches.
        """
        base = {"square": square, "votes": torch.full_like(square, vote)}
        found = self._reduce(base, sums, self.recorder, self._metrics)
        if self._is_first:
            self._is_first = False
            # The one time that the host waits for a step: every rank sees the same number.
            if self.recorder.metrics or self._world_size > 1:
                found = self._complete(found, base, sums, self.recorder, self._metrics)
        self.recorder.forget(self._metrics)
        return found

    def agree(self) -> None:
        """Exchange the names of metrics that are new since the last time. Collective."""
        self._exchange(self.recorder, self._metrics)

    def evaluating(self, wanted: frozenset[str]) -> Recorder:
        """The recorder of an evaluation, to be made active during its passes."""
        self._evaluating.wanted = wanted
        return self._evaluating

    def totals(self, sums: Sums) -> Totals:
        """Sum an evaluation over the ranks; the host waits for it."""
        base = {name: torch.zeros_like(sums.loss) for name in ("square", "votes")}
        found = self._reduce(base, sums, self._evaluating, self._evaluated)
        found = self._complete(found, base, sums, self._evaluating, self._evaluated)
        self._evaluating.forget(self._evaluated)
        numbers = found.result(torch.zeros_like(found.loss), found.bad()).read()
        return Totals(numbers.loss, numbers.weight, numbers.metrics, numbers.sources)

    def _complete(
        self, found: Reduced, base: dict[str, Tensor], sums: Sums, recorder: Recorder, metrics: dict[str, Metric]
    ) -> Reduced:
        if not float(found.unknown):
            return found
        self._exchange(recorder, metrics)
        return self._reduce(base, sums, recorder, metrics)

    def _reduce(self, base: dict[str, Tensor], sums: Sums, recorder: Recorder, metrics: dict[str, Metric]) -> Reduced:
        parts = dict(base)
        parts["unknown"] = torch.full_like(sums.loss, float(recorder.unknown(metrics)))
        counted = sums if self._counts_loss else sums.zeros()
        parts |= {"loss": counted.loss, "weight": counted.weight, "sources": counted.sources}
        for metric in metrics.values():
            parts[_key(metric)] = self._part(metric, recorder.get(metric.name))
        slots = Slots({name: part.numel() for name, part in parts.items()})
        vector = slots.pack(parts)
        if self._world_size > 1:
            dist.all_reduce(vector)
        return Reduced(slots.unpack(vector), list(metrics.values()))

    def _part(self, metric: Metric, value: Tensor | None) -> Tensor:
        """This rank's part of a metric: its value and weight, or its place among the values of all ranks."""
        if not metric.is_extremum:
            return torch.zeros(2, dtype=torch.float64, device=self._device) if value is None else value
        places = torch.zeros(self._world_size, dtype=torch.float64, device=self._device)
        if value is None:
            places[self._rank] = metric.neutral
        else:
            places[self._rank : self._rank + 1] = value
        return places

    def _exchange(self, recorder: Recorder, metrics: dict[str, Metric]) -> None:
        ranks: list[dict[str, Metric]] = [recorder.metrics]
        if self._world_size > 1:
            ranks = [{}] * self._world_size
            dist.all_gather_object(ranks, recorder.metrics)
        for name in sorted({name for known in ranks for name in known}):
            found = {known[name] for known in ranks if name in known}
            if len(found) > 1:
                raise UserError(
                    f"The metric '{name}' has several reductions or units: {', '.join(sorted(map(str, found)))}",
                    fix="Record one name with one reduction and unit on all ranks.",
                )
            metrics.setdefault(name, found.pop())


def _key(metric: Metric) -> str:
    return f"metric {metric.name}"
