"""The vector that all ranks sum in one all-reduce per step: its entries, and how the sum is decoded.

    square, votes, unknown     one entry each
    loss, weight               two entries in total, then two for each source of a mixture
    metrics                    named metrics: two entries (value, weight) for each sum, mean and norm; one entry per
                               rank for each maximum and minimum, so that the sum gathers the ranks' values

All ranks know the same metrics in the same order. A rank that records a new metric sets its `unknown` entry to 1. After
the first step the ranks then exchange names and reduce again; after later steps the trainer calls `agree`.

A step runs few operations on single numbers, because each costs as much host time as one on a matrix. Everything else
is computed on the host, when the vector is read.
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
"""Number of entries before those of sources and metrics."""


class Reduced:
    """The reduced vector of a step, on the device.

    Args:
        vector: The sum over all ranks, 1-D, float64.
        metrics: The metrics in the vector, in order.
        world_size: Number of ranks, which is the number of entries of each maximum and minimum.
    """

    def __init__(self, vector: Tensor, metrics: Sequence[Metric], world_size: int) -> None:
        self._vector, self._metrics, self._world_size = vector, tuple(metrics), world_size
        self.square, _, self.unknown, self.loss, self.weight = vector[:HEAD].unbind()

    @cached_property
    def _is_empty(self) -> Tensor:
        return self.weight == 0

    @cached_property
    def safe_weight(self) -> Tensor:
        """The sum of weights as a divisor: 1 if no token counts."""
        return self.weight + self._is_empty

    def bad(self, *finite: Tensor) -> Tensor:
        """Whether the update must be skipped, a boolean scalar: a value or the loss is not finite, or no token counts.

        Args:
            finite: Scalars that must be finite, such as the squared norm of the gradient.
        """
        # A float64 sum of FP32 results cannot overflow, and stays infinite or NaN if one of its terms is.
        total = sum(finite, self.loss)
        return (total.abs() < math.inf).logical_not_().logical_or_(self._is_empty)

    def result(self, norm: Tensor, bad: Tensor, loss_scale: Tensor | None = None) -> StepResult:
        """The results of the step.

        Args:
            norm: Norm of the gradient of loss / weight, before clipping; float64 scalar.
            bad: Whether the update was skipped; boolean scalar.
            loss_scale: Scale by which the loss and the weights are to be divided; float64 scalar. None: no scaling.
        """
        own = [norm, bad.double()] if loss_scale is None else [norm, bad.double(), loss_scale]
        numbers = torch.cat([self._vector, torch.stack(own)])
        return StepResult(numbers, partial(_decode, self._metrics, self._world_size, len(own)))


def _decode(metrics: Sequence[Metric], world_size: int, own: int, numbers: list[float]) -> StepNumbers:
    """Decode a step's results from the reduced vector and the `own` entries that `Reduced.result` appended."""
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
    """The value and the weight of a metric, from its entries."""
    if not metric.is_extremum:
        value, weight = entries
        return value, weight
    best = math.nan if any(map(math.isnan, entries)) else (max if metric.reduction == "max" else min)(entries)
    return best, float(best != metric.neutral)


class StepReducer:
    """Reduces the results of an engine's steps and evaluations over all ranks; each rank has one.

    Args:
        device: Device of the sums.
        rank, world_size: This rank, and the number of all ranks.
        sizes: Sizes of the mesh axes, which determine the ranks that count the loss.
        stream_is_part: Whether the residual stream is sharded over the tp axis (sequence parallelism).
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
        """Sum the results of a step over the ranks, in one all-reduce.

        Args:
            square: This rank's part of the squared norm of the gradient, a float64 scalar.
            vote: This rank's vote.
            sums: The sums over this rank's micro-batches.
        """
        found = self._reduce(square, vote, sums, self.recorder, self._metrics)
        if self._is_first:
            self._is_first = False
            # The host waits for the device only here, in the first step. All ranks read the same `unknown`.
            if self.recorder.metrics or self._world_size > 1:
                found = self._complete(found, square, vote, sums, self.recorder, self._metrics)
        self.recorder.forget(self._metrics)
        return found

    def skip_agreement(self) -> None:
        """Do not read `unknown` after the first step: for steps on tensors without values (meta, fake)."""
        self._is_first = False

    def agree(self) -> None:
        """Exchange the names of metrics that are new since the last exchange. Collective."""
        self._exchange(self.recorder, self._metrics)

    def evaluating(self, wanted: frozenset[str]) -> Recorder:
        """The recorder of an evaluation, to be made active during its forward passes.

        Args:
            wanted: Names of metrics that the model records only on request.
        """
        self._evaluating.wanted = wanted
        return self._evaluating

    def totals(self, sums: Sums) -> Totals:
        """Sum the results of an evaluation over the ranks; the host waits for the device."""
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
        """This rank's entries of a metric: value and weight; or, for an extremum, its value among zeros of others."""
        if not metric.is_extremum:
            return [self._zero[:2] if value is None else value]
        own = self._constant(metric.neutral) if value is None else value
        if self._world_size == 1:
            return [own]
        return [self._zeros(self._rank), own, self._zeros(self._world_size - self._rank - 1)]

    def _constant(self, *values: float) -> Tensor:
        """A float64 vector of constants on the device, cached, because copying it from the host would synchronise."""
        if values not in self._constants:
            entries = [torch.full((1,), value, dtype=torch.float64, device=self._device) for value in values]
            self._constants[values] = torch.cat(entries)
        return self._constants[values]

    def _zeros(self, count: int) -> Tensor:
        """Zeros on the device, float64 (count,), cached."""
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
