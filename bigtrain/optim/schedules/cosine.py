"""Warm-up, then half a cosine down to the final learning rate at the end of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from bigtrain.config import Duration
from bigtrain.optim.config import SCHEDULES, NonNegative, ScheduleConfig
from bigtrain.optim.schedule import Schedule, remaining


@SCHEDULES.register
class CosineConfig(ScheduleConfig):
    """Warm-up, then half a cosine down to `final_lr` at the end of the run."""

    ends_at_duration: ClassVar[bool] = True

    name: Literal["cosine"] = "cosine"
    final_lr: NonNegative = 0.0
    """Learning rate at the end of the run."""

    def build(self, base_lr: float, total_steps: int, to_steps: Callable[[Duration], int]) -> Schedule:
        """See `ScheduleConfig.build`."""
        warmup = to_steps(self.warmup)
        self.check_length(warmup, total_steps, "warmup")
        return Cosine(base_lr, warmup, total_steps, self.final_lr)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Warm-up, then half a cosine that reaches `final_lr` at `total_steps` (Loshchilov and Hutter 2017)."""

    total_steps: int
    final_lr: float

    def after_warmup(self, step: int) -> float:
        """The cosine; `final_lr` from `total_steps` on. See `Schedule.after_warmup`."""
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.final_lr + (self.peak_lr - self.final_lr) * remaining("cosine", progress)
