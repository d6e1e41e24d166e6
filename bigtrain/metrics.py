"""Named values of a step: recorded anywhere, reduced over all ranks by the all-reduce that a step makes anyway.

    record_metric("router_entropy", entropy, weight=batch["weights"], unit="nats")    # in a model's forward
    record_metric("gpu_power", watts, "max", unit="W")                                # in a callback

A recorder collects what this rank records between two reductions; `engines.step` sums it over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bigtrain.config import UserError

Reduction = Literal["sum", "mean", "max", "min", "norm"]
"""How values become one: added; averaged by weight; the largest; the smallest; the root of the sum of squares."""

TensorParallel = Literal["copy", "part", "stream"]
"""What the ranks of a tensor-parallel group compute a value from: the same (copy); each its own heads, columns or
tokens (part); the residual stream, which is a part under sequence parallelism and else a copy (stream)."""


@dataclass(frozen=True)
class Metric:
    """What all ranks know of a named value."""

    name: str
    reduction: Reduction = "mean"
    unit: str = ""

    @property
    def is_extremum(self) -> bool:
        """Whether one of the values is the result."""
        return self.reduction in ("max", "min")

    @property
    def neutral(self) -> float:
        """The value that changes no result."""
        return {"max": -math.inf, "min": math.inf}.get(self.reduction, 0.0)


@dataclass(frozen=True)
class Value:
    """A metric's value on some ranks or steps, ready to be merged with others."""

    metric: Metric
    value: float
    """The sum of values (times weights for a mean, of squares for a norm), or the extremum."""
    weight: float = 1.0
    """The sum of weights of a mean; else 0 where nothing was recorded."""

    @property
    def result(self) -> float | None:
        """The reduced value; None where nothing was recorded or the weights sum up to 0."""
        if not self.weight:
            return None
        if self.metric.reduction == "mean":
            return self.value / self.weight
        if self.metric.reduction == "norm":
            return math.sqrt(self.value) if self.value >= 0 else math.nan
        return self.value

    def merged(self, later: Value) -> Value:
        """Of both; of two steps' norms the later one."""
        if not later.weight:
            return self
        if not self.weight or self.metric.reduction == "norm":
            return later
        if self.metric.is_extremum:
            choose = max if self.metric.reduction == "max" else min
            return Value(self.metric, choose(self.value, later.value), self.weight)
        return Value(self.metric, self.value + later.value, self.weight + later.weight)

    def as_plain(self) -> dict[str, Any]:
        """For a checkpoint's manifest."""
        return {**asdict(self.metric), "value": self.value, "weight": self.weight}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Value:
        """What `as_plain` made."""
        metric = Metric(str(plain["name"]), plain["reduction"], str(plain["unit"]))
        return cls(metric, float(plain["value"]), float(plain["weight"]))


def merge(values: dict[str, Value], later: Mapping[str, Value]) -> None:
    """Merge named values into others, in place."""
    for name, value in later.items():
        values[name] = values[name].merged(value) if name in values else value


class Recorder:
    """What this rank has recorded since it was last taken.

    Args:
        device: Of the values.
        tensor_rank: This rank's number in its tensor-parallel group: a copy counts on the first.
        stream_is_part: Whether the residual stream is shared over that group (sequence parallelism).
    """

    def __init__(self, device: torch.device, tensor_rank: int = 0, stream_is_part: bool = False) -> None:
        self.metrics: dict[str, Metric] = {}
        """All that were recorded so far, by name."""
        self.wanted: frozenset[str] = frozenset()
        """Metrics that a model computes only where they are requested."""
        self.weight_scale: Tensor | None = None
        """Factor that weights carry (FP16's loss scale)."""
        self._device = device
        self._tensor_rank = tensor_rank
        self._stream_is_part = stream_is_part
        self._of_ranks = False
        self._values: dict[str, Tensor] = {}

    @contextmanager
    def active(self, of_ranks: bool = False) -> Iterator[Recorder]:
        """Let `record_metric` record here.

        Args:
            of_ranks: Values of the rank itself, as callbacks record them: they count on every rank, and one that is
                recorded again before the next reduction replaces the earlier one.
        """
        before, self._of_ranks = self._of_ranks, of_ranks
        _ACTIVE.append(self)
        try:
            yield self
        finally:
            _ACTIVE.pop()
            self._of_ranks = before

    def counts(self, tp: TensorParallel) -> bool:
        """Whether this rank's value is added to the others'."""
        is_part = tp == "part" or (tp == "stream" and self._stream_is_part)
        return is_part or self._of_ranks or self._tensor_rank == 0

    def record(self, metric: Metric, value: Tensor | float, weight: Tensor | float | None) -> None:
        """See `record_metric`."""
        known = self.metrics.setdefault(metric.name, metric)
        if known is not metric and known != metric:
            raise UserError(
                f"The metric '{metric.name}' is recorded as {metric.reduction} ({metric.unit or 'no unit'}) and as "
                f"{known.reduction} ({known.unit or 'no unit'})",
                fix="Give one of them another name.",
            )
        found = self._reduced(metric, self._tensor(value), weight)
        before = self._values.get(metric.name)
        if before is None or self._of_ranks:
            self._values[metric.name] = found
        elif metric.is_extremum:
            self._values[metric.name] = (torch.maximum if metric.reduction == "max" else torch.minimum)(before, found)
        else:
            before += found

    def get(self, name: str) -> Tensor | None:
        """What was recorded under a name: float64 (2,), value and weight; (1,) for an extremum."""
        return self._values.get(name)

    def forget(self, names: Iterable[str]) -> None:
        """Drop what was recorded under these names: it has been reduced."""
        for name in names:
            self._values.pop(name, None)

    def unknown(self, known: Mapping[str, Any]) -> bool:
        """Whether something was recorded that is not among the known names."""
        return not self._values.keys() <= known.keys()

    def _reduced(self, metric: Metric, value: Tensor, weight: Tensor | float | None) -> Tensor:
        if metric.reduction == "max":
            return value.amax().double().view(1)
        if metric.reduction == "min":
            return value.amin().double().view(1)
        if metric.reduction == "norm":
            square = value.double().square().sum()
            return torch.stack([square, torch.ones_like(square)])
        if weight is None:
            total = value.sum(dtype=torch.float64)
            return torch.stack([total, torch.full_like(total, value.numel())])
        factor = self._tensor(weight).double()
        if self.weight_scale is not None:
            factor = factor / self.weight_scale
        return torch.stack([(value * factor).sum(), factor.expand(value.shape).sum()])

    def _tensor(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach()
        # Filled on the device: copied from the host it would be waited for.
        return torch.full((), value, dtype=torch.float64, device=self._device)


_ACTIVE: list[Recorder] = []
"""The recorders that are in use, the innermost last."""


def record_metric(
    name: str,
    value: Tensor | float,
    reduction: Reduction = "mean",
    *,
    weight: Tensor | float | None = None,
    unit: str = "",
    tp: TensorParallel = "copy",
) -> None:
    """Record a named value of the step that is under way; without a host synchronisation.

    Values of one name are reduced over all calls, micro-batches, pipeline stages and ranks of a step, each counted
    once. Outside of a step (a model that is only called) nothing happens.

    Args:
        name: As metrics.jsonl is to show it; the same name always with the same reduction and unit.
        value: A number, or a tensor of any shape, of which all entries are reduced.
        reduction: How entries and ranks become one value.
        weight: Factor of each entry, for sum and mean: the batch's weights, or what is computed from them. In FP16
            these carry the loss scale, which is removed here. None: each entry counts as 1.
        unit: What one is of ("nats", "W").
        tp: What the ranks of a tensor-parallel group compute the value from.

    Raises:
        UserError: The name is known with another reduction or unit, or the reduction does not exist.
    """
    # In a backward pass a block that is recomputed runs for the second time.
    if _ACTIVE and torch._C._current_graph_task_id() == -1:
        if reduction not in get_args(Reduction):
            raise UserError(
                f"The metric '{name}' has the reduction '{reduction}'", fix=f"Use {', '.join(get_args(Reduction))}."
            )
        recorder = _ACTIVE[-1]
        metric = Metric(name, reduction, unit)
        if recorder.counts(tp):
            recorder.record(metric, value, weight)


@contextmanager
def not_recorded() -> Iterator[None]:
    """Record nothing inside: for passes of a model beside the one whose metrics count."""
    active = _ACTIVE[:]
    _ACTIVE.clear()
    try:
        yield
    finally:
        _ACTIVE.extend(active)


def wants_metric(name: str) -> bool:
    """Whether a metric that is expensive to compute is requested; evaluators use it for their metrics."""
    return bool(_ACTIVE) and name in _ACTIVE[-1].wanted


# A compiled block calls it as it is.
record_metric._torchdynamo_disable = True  # type: ignore[attr-defined]
