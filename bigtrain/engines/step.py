"""The vector that the ranks sum once a step: what each entry is, and what becomes of the sum.

    square, votes, unknown     one entry each
    loss, weight               of all, then of each source of a mixture
    metrics                    what was recorded by name: two entries for each sum, mean and norm, one for each rank
                               of an extremum, so that the sum gathers them

All ranks know the same metrics in the same order. A rank that records a new one says so in `unknown`; in the first step
the ranks then exchange names and reduce again, later when the trainer lets them (`agree`).

On the device a step does little: each operation on a single number costs as much host time as one on a matrix. What
needs no device is decoded from the vector when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.config import UserError
from bigtrain.engines.contract import StepNumbers, StepResult, Totals
from bigtrain.metrics import Metric, Recorder, Value
from bigtrain.models.sums import Sums
from bigtrain.parallel.config import Mesh

HEAD = 5
"""Entries before those of sources and metrics."""


class Reduced:
    """What a step sums, over all ranks; tensors on the device.

    Args:
        vector: The sum, float64.
        metrics: Those in it, in order.
        world_size: Ranks, each of which has an entry of an extremum.
    """

    def __init__(self, vector: Tensor, metrics: Sequence[Metric], world_size: int) -> None:
        self._vector, self._metrics, self._world_size = vector, tuple(metrics), world_size
        self.square, _, self.unknown, self.loss, self.weight = vector[:HEAD].unbind()

    @cached_property
    def _is_empty(self) -> Tensor:
        return self.weight == 0

    @cached_property
    def safe_weight(self) -> Tensor:
        """The sum of weights to divide by: 1 where no token counts."""
        return self.weight + self._is_empty

    def bad(self, *finite: Tensor) -> Tensor:
        """Whether the step must update nothing: one of the values, or the loss, is not finite, or no token counts."""
        # A sum of float64 overflows for no values that FP32 has made, and keeps what is not finite.
        total = sum(finite, self.loss)
        return (total.abs() < math.inf).logical_not_().logical_or_(self._is_empty)

    def result(self, norm: Tensor, bad: Tensor, loss_scale: Tensor | None = None) -> StepResult:
        """The numbers of the step; `loss_scale`: what loss and weight are to be divided by."""
        own = [norm, bad.double()] if loss_scale is None else [norm, bad.double(), loss_scale]
        numbers = torch.cat([self._vector, torch.stack(own)])
        return StepResult(numbers, partial(_decode, self._metrics, self._world_size, len(own)))


def _decode(metrics: Sequence[Metric], world_size: int, own: int, numbers: list[float]) -> StepNumbers:
    """Decode a step's numbers from the reduced vector; `Reduced.result` has appended the last of them."""
    _, votes, unknown, loss, weight, *rest = numbers[:-own]
    norm, bad, *scales = numbers[-own:]
    scale = scales[0] if scales else 1.0
    end = len(rest) - sum(_entries(metric, world_size) for metric in metrics)
    sources = tuple((rest[at] / scale, rest[at + 1] / scale) for at in range(0, end, 2))
    named = {}
    for metric in metrics:
        begin, end = end, end + _entries(metric, world_size)
        named[metric.name] = Value(metric, *_pair(metric, rest[begin:end]))
    return StepNumbers(
        loss / scale, weight / scale, norm, votes, bad, scale if scales else None, sources, named, unknown
    )


def _entries(metric: Metric, world_size: int) -> int:
    return world_size if metric.is_extremum else 2


def _pair(metric: Metric, entries: list[float]) -> tuple[float, float]:
    """A metric's value and weight."""
    if not metric.is_extremum:
        value, weight = entries
        return value, weight
    best = math.nan if any(map(math.isnan, entries)) else (max if metric.reduction == "max" else min)(entries)
    return best, float(best != metric.neutral)


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
        self._constants: dict[tuple[float, ...], Tensor] = {}
        self._zero = torch.zeros(2, dtype=torch.float64, device=device)

    def reduce(self, square: Tensor, vote: float, sums: Sums) -> Reduced:
        """Sum over the ranks what a step adds up, in one all-reduce.

        Args:
            square: float64 scalar, this rank's part of the square of the gradient's norm.
            vote: This rank's.
            sums: Of its micro-batches.
        """
        found = self._reduce(square, vote, sums, self.recorder, self._metrics)
        if self._is_first:
            self._is_first = False
            # The one time that the host waits for a step: every rank sees the same number.
            if self.recorder.metrics or self._world_size > 1:
                found = self._complete(found, square, vote, sums, self.recorder, self._metrics)
        self.recorder.forget(self._metrics)
        return found

    def skip_agreement(self) -> None:
        """Do not read the first step's number of unknown metrics: for a step on tensors that have no values."""
        self._is_first = False

    def agree(self) -> None:
        """Exchange the names of metrics that are new since the last time. Collective."""
        self._exchange(self.recorder, self._metrics)

    def evaluating(self, wanted: frozenset[str]) -> Recorder:
        """The recorder of an evaluation, to be made active during its passes."""
        self._evaluating.wanted = wanted
        return self._evaluating

    def totals(self, sums: Sums) -> Totals:
        """Sum an evaluation over the ranks; the host waits for it."""
        nothing = self._zero[0]
        found = self._reduce(nothing, 0.0, sums, self._evaluating, self._evaluated)
        found = self._complete(found, nothing, 0.0, sums, self._evaluating, self._evaluated)
        self._evaluating.forget(self._evaluated)
        numbers = found.result(nothing, nothing).read()
        return Totals(numbers.loss, numbers.weight, numbers.metrics, numbers.sources)

    def _complete(
        self, found: Reduced, square: Tensor, vote: float, sums: Sums, recorder: Recorder, metrics: dict[str, Metric]
    ) -> Reduced:
        if not float(found.unknown):
            return found
        self._exchange(recorder, metrics)
        return self._reduce(square, vote, sums, recorder, metrics)

    def _reduce(
        self, square: Tensor, vote: float, sums: Sums, recorder: Recorder, metrics: dict[str, Metric]
    ) -> Reduced:
        own = sums.vector if self._counts_loss else self._zeros(len(sums.vector))
        parts = [square.view(1), self._constant(vote, float(recorder.unknown(metrics))), own]
        for metric in metrics.values():
            parts += self._parts(metric, recorder.get(metric.name))
        vector = torch.cat(parts)
        if self._world_size > 1:
            dist.all_reduce(vector)
        return Reduced(vector, list(metrics.values()), self._world_size)

    def _parts(self, metric: Metric, value: Tensor | None) -> list[Tensor]:
        """This rank's part of a metric: its value and weight, or its place among the values of all ranks."""
        if not metric.is_extremum:
            return [self._zero[:2] if value is None else value]
        own = self._constant(metric.neutral) if value is None else value
        if self._world_size == 1:
            return [own]
        return [self._zeros(self._rank), own, self._zeros(self._world_size - self._rank - 1)]

    def _constant(self, *values: float) -> Tensor:
        """Numbers on the device, made once: copied from the host they would be waited for."""
        if values not in self._constants:
            entries = [torch.full((1,), value, dtype=torch.float64, device=self._device) for value in values]
            self._constants[values] = torch.cat(entries)
        return self._constants[values]

    def _zeros(self, count: int) -> Tensor:
        """(count,): zeros on the device, made once."""
        if len(self._zero) < count:
            self._zero = torch.zeros(count, dtype=torch.float64, device=self._device)
        return self._zero[:count]

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
