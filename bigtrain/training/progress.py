"""The progress of a run. With the weights and the optimizer state, it is all that a resume needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bigtrain.metrics import Metric, Value
from bigtrain.training.bad_steps import Record


@dataclass
class Progress:
    """The position of a run, and its sums since the last logged step; saved with each checkpoint."""

    step: int = 0
    """Number of steps done."""

    tokens: float = 0.0
    """Sum of the weights of all samples consumed; what it counts depends on the model (`metric_units`)."""

    drawn: dict[str, int] = field(default_factory=dict)
    """Sequences consumed from each source of the training data."""

    interval_loss: float = 0.0
    """Sum of the losses since the last logged step, on rank 0. It is saved because a resume may start in between."""

    interval_weight: float = 0.0
    """Sum of the weights since the last logged step, without skipped steps."""

    bad_steps: Record = field(default_factory=Record)
    """The state of the policy for bad steps."""

    interval_metrics: dict[str, Value] = field(default_factory=dict)
    """Metrics recorded since the last logged step, by name, without skipped steps."""

    source_tokens: dict[str, float] | None = field(default_factory=dict)
    """Sum of the weights of each source of a mixture; None if the run began with a bigtrain that did not sum them."""

    callbacks: dict[str, Any] = field(default_factory=dict)
    """The states of the callbacks that have one, by callback key."""

    def end_interval(self) -> None:
        """Reset the sums after a step has been logged."""
        self.interval_loss = self.interval_weight = 0.0
        self.interval_metrics = {}


def as_plain(progress: Progress) -> dict[str, Any]:
    """Convert the progress to the plain values that a checkpoint's manifest holds."""
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "drawn": dict(progress.drawn),
        "interval": {
            "loss": progress.interval_loss,
            "weight": progress.interval_weight,
            "metrics": [value.as_plain() for value in progress.interval_metrics.values()],
        },
        "bad_steps": progress.bad_steps.as_plain(),
        "source_tokens": progress.source_tokens,
        "callbacks": progress.callbacks,
    }


def from_plain(plain: Mapping[str, Any]) -> Progress:
    """Read the progress from the plain values of a checkpoint's manifest, also of one by an earlier version."""
    interval = plain.get("interval", {"loss": 0.0, "weight": 0.0})
    values = [Value.from_plain(value) for value in interval.get("metrics", ())]
    # Earlier versions stored two sums (loss and weight) for each source.
    values += [
        Value(source_loss(name), float(loss), float(weight))
        for name, (loss, weight) in interval.get("sources", {}).items()
    ]
    return Progress(
        step=int(plain["step"]),
        tokens=float(plain["tokens"]),
        drawn={str(name): int(count) for name, count in plain["drawn"].items()},
        interval_loss=float(interval["loss"]),
        interval_weight=float(interval["weight"]),
        bad_steps=Record(**plain.get("bad_steps", {})),
        interval_metrics={value.metric.name: value for value in values},
        source_tokens=plain.get("source_tokens"),
        callbacks=dict(plain.get("callbacks", {})),
    )


def source_loss(name: str) -> Metric:
    """The metric that holds the loss of one source of a mixture."""
    return Metric(f"loss/{name}", "mean")
