"""The learning rate as a function of the step: pure arithmetic, no state, no torch.

All schedules begin with the same linear warm-up: step s < warmup has lr * (s + 1) / warmup, so the first step
already learns and step warmup - 1 reaches the peak.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

DecayShape = Literal["linear", "1-sqrt", "cosine"]


@dataclass(frozen=True)
class Schedule(ABC):
    """The learning rate at each step; steps are counted from 0."""

    peak_lr: float
    warmup_steps: int

    def lr(self, step: int) -> float:
        """The learning rate that `step` is taken with."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        return self.after_warmup(step)

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """The learning rate of a step that is not in the warm-up."""

    @property
    @abstractmethod
    def free_until(self) -> int | None:
        """The step from which on the rate depends on the total duration; None: it never does."""

    def may_extend(self, steps_done: int) -> bool:
        """Whether a longer duration leaves the first `steps_done` steps as they were."""
        return self.free_until is None or steps_done <= self.free_until


@dataclass(frozen=True)
class Constant(Schedule):
    """Warm-up, then the peak for ever."""

    def after_warmup(self, step: int) -> float:
        """The peak."""
        return self.peak_lr

    @property
    def free_until(self) -> int | None:
        """None: the duration plays no part."""
        return None


@dataclass(frozen=True)
class Cosine(Schedule):
    """Warm-up, then half a cosine that reaches `final_lr` at `total_steps` (Loshchilov and Hutter 2017)."""

    total_steps: int
    final_lr: float

    def after_warmup(self, step: int) -> float:
        """The cosine; `final_lr` past the end."""
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.final_lr + (self.peak_lr - self.final_lr) * remaining("cosine", progress)

    @property
    def free_until(self) -> int | None:
        """The first step after the peak."""
        return self.warmup_steps


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Warm-up, the peak, then a decay over the last `decay_steps` (Hu et al. 2024, Haegele et al. 2024)."""

    total_steps: int
    decay_steps: int
    final_lr: float
    shape: DecayShape

    @property
    def decay_start(self) -> int:
        """The first step of the decay, still at the peak."""
        return self.total_steps - self.decay_steps

    def after_warmup(self, step: int) -> float:
        """The peak, or the decay; `final_lr` past the end."""
        if step < self.decay_start:
            return self.peak_lr
        progress = (step - self.decay_start) / max(1, self.decay_steps)
        return self.final_lr + (self.peak_lr - self.final_lr) * remaining(self.shape, progress)

    @property
    def free_until(self) -> int | None:
        """The start of the decay."""
        return self.decay_start


def remaining(shape: DecayShape, progress: float) -> float:
    """The part of a decay that is still to come, from 1 at progress 0 to 0 at progress 1 and after."""
    progress = min(max(progress, 0.0), 1.0)
    if shape == "linear":
        return 1.0 - progress
    if shape == "1-sqrt":
        return 1.0 - math.sqrt(progress)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
