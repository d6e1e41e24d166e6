"""How far a run is: with the weights and the optimizer, all that a resume needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bigtrain.metrics import Metric, Value
from bigtrain.training.bad_steps import Record


@dataclass
class Progress:
    """The position of a run, and what it has summed since the last logged step; saved with each checkpoint."""

    step: int = 0
    """Optimizer steps done."""

    tokens: float = 0.0
    """Sum of the weights of all samples consumed: tokens for text, images for images."""

    drawn: dict[str, int] = field(default_factory=dict)
    """Sequences consumed from each source of the training data."""

    interval_loss: float = 0.0
    """Sum of the losses since the last logged step, on the rank that logs: a resume may fall between two of them."""

    interval_weight: float = 0.0
    """Sum of the weights since the last logged step, without those of steps that were skipped."""

    bad_steps: Record = field(default_factory=Record)
    """What the policy for bad steps remembers."""

    interval_metrics: dict[str, Value] = field(default_factory=dict)
    """What was recorded by name since the last logged step, without steps that were skipped."""

    source_tokens: dict[str, float] | None = field(default_factory=dict)
    """Sum of the weights of each source of a mixture; None in a run that began before they were counted."""

    callbacks: dict[str, Any] = field(default_factory=dict)
    """The state of the callbacks that have one, by their keys."""

    def end_interval(self) -> None:
        """Start to sum anew: a step has been logged."""
        self.interval_loss = self.interval_weight = 0.0
        self.interval_metrics = {}


def as_plain(progress: Progress) -> dict[str, Any]:
    """The progress as a checkpoint's manifest holds it."""
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
    """The progress that a checkpoint's manifest holds, also one of an earlier version."""
    interval = plain.get("interval", {"loss": 0.0, "weight": 0.0})
    values = [Value.from_plain(value) for value in interval.get("metrics", ())]
    # Earlier versions kept two sums of each source.
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
    """The loss of one source of a mixture."""
    return Metric(f"loss/{name}", "mean", "nats per token")
