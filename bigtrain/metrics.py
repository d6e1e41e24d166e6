"""Named metrics of a step. Any code may record one; the all-reduce that every step makes reduces them over all ranks.

    record_metric("router_entropy", entropy, weight=batch["weights"], unit="nats")    # in a model's forward
    record_metric("gpu_power", watts, "max", unit="W")                                # in a callback

A `Recorder` collects the values that this rank records between two reductions; `engines.step` sums them over the ranks.
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
"""How several values become one: sum, weighted mean, maximum, minimum, or L2 norm (root of the sum of squares)."""

TensorParallel = Literal["copy", "part", "stream"]
"""What the ranks of a tensor-parallel group compute a value from.

- "copy": all ranks compute it from the same tensors.
- "part": each rank computes it from its own heads, columns or tokens.
- "stream": from the residual stream. This is a "part" under sequence parallelism, and a "copy" otherwise.
"""


@dataclass(frozen=True)
class Metric:
    """Name, reduction and unit of a metric, equal on all ranks."""

    name: str
    reduction: Reduction = "mean"
    unit: str = ""

    @property
    def is_extremum(self) -> bool:
        """Whether the reduction picks one of the values: a maximum or minimum."""
        return self.reduction in ("max", "min")

    @property
    def neutral(self) -> float:
        """The neutral element of the reduction: -inf for a maximum, inf for a minimum, else 0."""
        return {"max": -math.inf, "min": math.inf}.get(self.reduction, 0.0)


@dataclass(frozen=True)
class Value:
    """A metric's partial result over some ranks or steps, which can be merged with others."""

    metric: Metric
    value: float
    """The sum of the values, for a mean of value times weight, for a norm of the squares; or the extremum."""
    weight: float = 1.0
    """For a mean, the sum of weights. For other reductions, 0 if no value was recorded."""

    @property
    def result(self) -> float | None:
        """The reduced value; None if no value was recorded or the weights add up to 0."""
        if not self.weight:
            return None
        if self.metric.reduction == "mean":
            return self.value / self.weight
        if self.metric.reduction == "norm":
            return math.sqrt(self.value) if self.value >= 0 else math.nan
        return self.value

    def merged(self, later: Value) -> Value:
        """The value over both; of two norms, the later step's."""
        if not later.weight:
            return self
        if not self.weight or self.metric.reduction == "norm":
            return later
        if self.metric.is_extremum:
            choose = max if self.metric.reduction == "max" else min
            return Value(self.metric, choose(self.value, later.value), self.weight)
        return Value(self.metric, self.value + later.value, self.weight + later.weight)

    def as_plain(self) -> dict[str, Any]:
        """The value as JSON types, for a checkpoint's manifest."""
        return {**asdict(self.metric), "value": self.value, "weight": self.weight}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Value:
        """The value from which `as_plain` made `plain`."""
        metric = Metric(str(plain["name"]), plain["reduction"], str(plain["unit"]))
        return cls(metric, float(plain["value"]), float(plain["weight"]))


def merge(values: dict[str, Value], later: Mapping[str, Value]) -> None:
    """Merge the values of `later` into `values` by name, in place."""
    for name, value in later.items():
        values[name] = values[name].merged(value) if name in values else value


class Recorder:
    """Collects the values that this rank records between two reductions.

    Args:
        device: Device of the values.
        tensor_rank: This rank's index in its tensor-parallel group; only index 0 records the values of a "copy".
        stream_is_part: Whether the residual stream is sharded over that group (sequence parallelism).
    """

    def __init__(self, device: torch.device, tensor_rank: int = 0, stream_is_part: bool = False) -> None:
        self.metrics: dict[str, Metric] = {}
        """All metrics recorded so far, by name."""
        self.wanted: frozenset[str] = frozenset()
        """Names of the requested metrics, among those that a model computes only on request."""
        self.weight_scale: Tensor | None = None
        """Factor that the batch's weights include (FP16's loss scale); recorded weights are divided by it."""
        self._device = device
        self._tensor_rank = tensor_rank
        self._stream_is_part = stream_is_part
        self._of_ranks = False
        self._values: dict[str, Tensor] = {}

    @contextmanager
    def active(self, of_ranks: bool = False) -> Iterator[Recorder]:
        """Make `record_metric` record into this recorder within the `with` block.

        Args:
            of_ranks: Whether the values describe the rank itself, like those of callbacks. Such values count on every
                rank, and a value replaces an earlier one of the same name until the next reduction.
        """
        before, self._of_ranks = self._of_ranks, of_ranks
        _ACTIVE.append(self)
        try:
            yield self
        finally:
            _ACTIVE.pop()
            self._of_ranks = before

    def counts(self, tp: TensorParallel) -> bool:
        """Whether this rank's value enters the reduction; a copy enters it once for each tensor-parallel group."""
        is_part = tp == "part" or (tp == "stream" and self._stream_is_part)
        return is_part or self._of_ranks or self._tensor_rank == 0

    def record(self, metric: Metric, value: Tensor | float, weight: Tensor | float | None) -> None:
        """Record a value; see `record_metric`."""
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
        """The partial result of a metric: float64 (2,) of value and weight, or (1,) for an extremum. None: no value."""
        return self._values.get(name)

    def forget(self, names: Iterable[str]) -> None:
        """Drop the recorded values of these names, once they have been reduced."""
        for name in names:
            self._values.pop(name, None)

    def unknown(self, known: Mapping[str, Any]) -> bool:
        """Whether a value was recorded under a name that is not in `known`."""
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
        # Filled on the device: a copy from the host would make the host wait.
        return torch.full((), value, dtype=torch.float64, device=self._device)


_ACTIVE: list[Recorder] = []
"""The active recorders; the innermost is last, and receives the values."""


def record_metric(
    name: str,
    value: Tensor | float,
    reduction: Reduction = "mean",
    *,
    weight: Tensor | float | None = None,
    unit: str = "",
    tp: TensorParallel = "copy",
) -> None:
    """Record a named value of the current step, without a host synchronisation.

    Values of one name are reduced over all calls, micro-batches, pipeline stages and ranks of a step, each counted
    once. Outside of a step (a model that is only called) the function does nothing.

    Args:
        name: The metric's name in metrics.jsonl. A name must always have the same reduction and unit.
        value: A number, or a tensor of any shape, whose entries are all reduced.
        reduction: How the entries, over all ranks, become one value.
        weight: Factor of each entry, for "sum" and "mean": the batch's weights, or a tensor computed from them. In FP16
            the batch's weights include the loss scale, which is removed here. None: each entry has weight 1.
        unit: Unit of the value ("nats", "W").
        tp: What the ranks of a tensor-parallel group compute the value from.

    Raises:
        UserError: The name was recorded before with another reduction or unit, or the reduction does not exist.
    """
    # In a backward pass, activation recomputation runs a block for the second time.
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
    """Record no metrics in the `with` block, for extra forward passes of a model."""
    active = _ACTIVE[:]
    _ACTIVE.clear()
    try:
        yield
    finally:
        _ACTIVE.extend(active)


def wants_metric(name: str) -> bool:
    """Whether a metric that is expensive to compute is requested; evaluators request their metrics."""
    return bool(_ACTIVE) and name in _ACTIVE[-1].wanted


# torch.compile does not trace it: a compiled block calls it as a Python function.
record_metric._torchdynamo_disable = True  # type: ignore[attr-defined]
