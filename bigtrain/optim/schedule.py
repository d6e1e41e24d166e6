"""The learning rate as a function of the step: pure arithmetic, no state, no torch.

All schedules begin with the same linear warm-up: step s < warmup has lr * (s + 1) / warmup. The learning rate of step 0
is therefore above zero, and step warmup - 1 reaches the peak.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

DecayShape = Literal["linear", "1-sqrt", "cosine"]


@dataclass(frozen=True)
class Schedule(ABC):
    """The learning rate of each step; steps are counted from 0."""

    peak_lr: float
    warmup_steps: int

    def lr(self, step: int) -> float:
        """The learning rate of `step`; for a model with parts, a `PartRates`."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        return self.after_warmup(step)

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """The learning rate of a step at or after the end of the warm-up."""


class PartRates(float):
    """The learning rates of a step, one for each part of the model. Its float value is that of the first part."""

    of: Mapping[str, float]
    """Learning rate by the name of the part."""

    @classmethod
    def make(cls, of: Mapping[str, float]) -> PartRates:
        """Build from the learning rate of each part by name, in the order of the parts."""
        rates = cls(next(iter(of.values())))
        rates.of = dict(of)
        return rates


@dataclass(frozen=True)
class PartSchedules(Schedule):
    """The schedules of a model with parts, one for each part."""

    parts: Mapping[str, Schedule]

    def lr(self, step: int) -> float:
        """See `Schedule.lr`."""
        return PartRates.make({name: schedule.lr(step) for name, schedule in self.parts.items()})

    def after_warmup(self, step: int) -> float:
        """See `Schedule.after_warmup`."""
        return next(iter(self.parts.values())).after_warmup(step)


def rates(schedule: Schedule, step: int) -> dict[str, float]:
    """The learning rates of a step, by the name of the part; a model without parts has the single name ""."""
    lr = schedule.lr(step)
    return dict(lr.of) if isinstance(lr, PartRates) else {"": lr}


def remaining(shape: DecayShape, progress: float) -> float:
    """The fraction of a decay that remains: 1 up to progress 0, 0 from progress 1 on.

    Args:
        shape: Form of the decay between the two ends.
        progress: Fraction of the decay's steps that have passed.
    """
    progress = min(max(progress, 0.0), 1.0)
    if shape == "linear":
        return 1.0 - progress
    if shape == "1-sqrt":
        return 1.0 - math.sqrt(progress)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
