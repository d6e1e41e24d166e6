"""The learning rate as a function of the step: pure arithmetic, no state, no torch.

All schedules begin with the same linear warm-up: step s < warmup has lr * (s + 1) / warmup, so the first step
already learns and step warmup - 1 reaches the peak.
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
    """The learning rate at each step; steps are counted from 0."""

    peak_lr: float
    warmup_steps: int

    def lr(self, step: int) -> float:
        """The learning rate that `step` is taken with; of a model in parts a `PartRates`."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        return self.after_warmup(step)

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """The learning rate of a step that is not in the warm-up."""


class PartRates(float):
    """The learning rate of a step, where each part of the model has its own; as a number the first part's."""

    of: Mapping[str, float]

    @classmethod
    def make(cls, of: Mapping[str, float]) -> PartRates:
        """From the learning rate of each part by its name, the first one first."""
        rates = cls(next(iter(of.values())))
        rates.of = dict(of)
        return rates


@dataclass(frozen=True)
class PartSchedules(Schedule):
    """A schedule for each part of a model."""

    parts: Mapping[str, Schedule]

    def lr(self, step: int) -> float:
        """See `Schedule.lr`."""
        return PartRates.make({name: schedule.lr(step) for name, schedule in self.parts.items()})

    def after_warmup(self, step: int) -> float:
        """See `Schedule.after_warmup`."""
        return next(iter(self.parts.values())).after_warmup(step)


def rates(schedule: Schedule, step: int) -> dict[str, float]:
    """The learning rates of a step by the names of the parts; "" where the model has none."""
    lr = schedule.lr(step)
    return dict(lr.of) if isinstance(lr, PartRates) else {"": lr}


def remaining(shape: DecayShape, progress: float) -> float:
    """The part of a decay that remains, from 1 at progress 0 to 0 at progress 1 and after."""
    progress = min(max(progress, 0.0), 1.0)
    if shape == "linear":
        return 1.0 - progress
    if shape == "1-sqrt":
        return 1.0 - math.sqrt(progress)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
