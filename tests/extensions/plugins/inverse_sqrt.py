"""A user's schedule: the inverse square root of the step, which no duration changes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bigtrain.config import Duration
from bigtrain.optim.config import SCHEDULES, ScheduleConfig
from bigtrain.optim.schedule import Schedule


@SCHEDULES.register
class InverseSqrtConfig(ScheduleConfig):
    """Warm-up, then lr * sqrt(warmup / step) (Vaswani et al. 2017, eq. 3)."""

    name: Literal["inverse-sqrt"] = "inverse-sqrt"

    def build(self, base_lr: float, total_steps: int, to_steps: Callable[[Duration], int]) -> Schedule:
        return InverseSqrt(base_lr, to_steps(self.warmup))


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    def after_warmup(self, step: int) -> float:
        return self.peak_lr * (max(self.warmup_steps, 1) / (step + 1)) ** 0.5
