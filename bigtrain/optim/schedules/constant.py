"""A constant learning rate after the warm-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bigtrain.config import Duration
from bigtrain.optim.config import SCHEDULES, ScheduleConfig
from bigtrain.optim.schedule import Schedule


@SCHEDULES.register
class ConstantConfig(ScheduleConfig):
    """Warm-up, then a constant learning rate."""

    name: Literal["constant"] = "constant"

    def build(self, base_lr: float, total_steps: int, to_steps: Callable[[Duration], int]) -> Schedule:
        """See `ScheduleConfig.build`."""
        return Constant(base_lr, to_steps(self.warmup))


@dataclass(frozen=True)
class Constant(Schedule):
    """Warm-up, then a constant learning rate."""

    def after_warmup(self, step: int) -> float:
        """The peak learning rate; see `Schedule.after_warmup`."""
        return self.peak_lr
