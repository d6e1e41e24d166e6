"""WSD schedule: warm-up, a stable phase at the peak, decay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import field_validator

from bigtrain.config import Duration
from bigtrain.optim.config import SCHEDULES, NonNegative, Percentage, Portion, ScheduleConfig, in_training
from bigtrain.optim.schedule import DecayShape, Schedule, remaining


@SCHEDULES.register
class WSDConfig(ScheduleConfig):
    """Warm-up, a stable phase at the peak, decay. The run may be lengthened until its decay begins."""

    name: Literal["wsd"] = "wsd"
    final_lr: NonNegative = 0.0
    """Learning rate at the end of the run."""
    decay: Portion = Percentage(20.0)
    """Length of the decay at the end of the run: a percentage of the run ("20%"), or steps, tokens or epochs."""
    shape: DecayShape = "1-sqrt"
    """Form of the decay over its steps."""

    @field_validator("decay")
    @classmethod
    def _decays_over_training(cls, value: Percentage | Duration) -> Percentage | Duration:
        return in_training(value) if isinstance(value, Duration) else value

    def build(self, base_lr: float, total_steps: int, to_steps: Callable[[Duration], int]) -> Schedule:
        """See `ScheduleConfig.build`."""
        warmup = to_steps(self.warmup)
        decay = self.decay.of(total_steps) if isinstance(self.decay, Percentage) else to_steps(self.decay)
        self.check_length(warmup + decay, total_steps, "warmup and decay")
        return WarmupStableDecay(base_lr, warmup, total_steps, decay, self.final_lr, self.shape)


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Warm-up, the peak, then a decay over the last `decay_steps` steps (Hu et al. 2024, Haegele et al. 2024)."""

    total_steps: int
    decay_steps: int
    final_lr: float
    shape: DecayShape

    @property
    def decay_start(self) -> int:
        """The first step of the decay, which still has the peak learning rate."""
        return self.total_steps - self.decay_steps

    def after_warmup(self, step: int) -> float:
        """The peak before `decay_start`, then the decay; `final_lr` from `total_steps` on."""
        if step < self.decay_start:
            return self.peak_lr
        progress = (step - self.decay_start) / max(1, self.decay_steps)
        return self.final_lr + (self.peak_lr - self.final_lr) * remaining(self.shape, progress)
