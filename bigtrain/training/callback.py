"""Callbacks: objects that receive each event of the loop, may record metrics, and may vote to save or to stop.

class StopAtLoss(Callback):
    def on_step(self, step, progress):
        if step.loss is not None and step.loss < 2.0:
            self.vote_to_stop(f"the loss of step {step.number} is below 2")
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config import UserError

if TYPE_CHECKING:
    import enum
    from collections.abc import Mapping

    import torch

    from bigtrain.data.loader import StepBatch
    from bigtrain.engines.contract import Engine
    from bigtrain.metrics import Value
    from bigtrain.training.prepare import Prepared
    from bigtrain.training.progress import Progress


@dataclass
class Step:
    """One finished step, as callbacks receive it. All ranks have equal values, except for the times and the batch."""

    number: int
    """The step's number, counted from 1."""

    batch: StepBatch
    lr: float
    loss_sum: float
    weight: float
    gradient_norm: float
    seconds: float
    data_wait_s: float
    skipped: bool = False
    """Whether the step updated nothing: the loss or the gradient was not finite, or no token counted."""
    loss_scale: float | None = None
    """The loss scale of FP16 mixed precision; None in other precisions."""
    metrics: Mapping[str, Value] = field(default_factory=dict)
    """The metrics that this step carried, by name, reduced over all ranks."""
    evaluation: dict[str, float | None] = field(default_factory=dict)
    """Held-out metrics (`val_...`) if an evaluation followed this step; else empty."""
    units: Mapping[str, str] = field(default_factory=dict)
    """Units of the held-out metrics that have one, by name."""
    pictures: dict[str, str] = field(default_factory=dict)
    """Paths of PNG files by title. Callbacks of an `order` below 20 add them; trackers receive them with this step."""

    @property
    def loss(self) -> float | None:
        """The mean loss of the global batch; None if no token counted."""
        return self.loss_sum / self.weight if self.weight else None

    def held_out(self, metric: str, where: str) -> float | None:
        """A metric of this step's evaluation; None if no token counted or the value is not finite.

        Args:
            where: The config key that names the metric, for the error message.

        Raises:
            UserError: The evaluation gives no such metric.
        """
        if metric not in self.evaluation:
            raise UserError(
                f"No evaluation records the metric '{metric}'",
                where,
                f"Known: {', '.join(self.evaluation)}. Others come with evaluation.evaluators.",
            )
        value = self.evaluation[metric]
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class CallbackContext:
    """The parts of a run that a callback may use."""

    engine: Engine
    directory: Path
    """The run directory."""
    total_steps: int
    rank: int
    world_size: int
    device: torch.device
    prepared: Prepared
    """The run's config together with its data."""


class Callback:
    """Base class of callbacks. Every rank passes each event of the loop to its callbacks, in ascending `order`.

    `bigtrain.metrics.record_metric` may be called in every event: the next step to be launched reduces the value over
    all ranks. If a rank records a metric twice, the newest value counts. The second step after an evaluation or a save
    carries no values, because it is launched before the callbacks receive the first one.
    """

    order: int = 50

    key: str = ""
    """The name under which `state` is saved."""

    stop_cause: str | None = None
    """Why this callback wants the run to end; None if it does not."""

    wants_save: bool = False
    """Whether this callback wants a checkpoint."""

    saves_evaluated: bool = False
    """Whether this callback wants a checkpoint of the last evaluated step."""

    def on_start(self, progress: Progress) -> None:
        """Called before the first step of this process."""

    def on_step(self, step: Step, progress: Progress) -> None:
        """Called after each step, in order; if the step has an evaluation, after the evaluation."""

    def on_save(self, progress: Progress) -> None:
        """Called after a checkpoint has been taken; its files may not have been written yet."""

    def on_roll_back(self, progress: Progress) -> None:
        """Called after a roll-back: the steps after `progress.step` will be trained again, on other batches."""

    def on_end(self, outcome: enum.Enum, progress: Progress) -> None:
        """Called after the last step, when everything is saved."""

    def vote_to_stop(self, cause: str) -> None:
        """Let the run save a checkpoint and end as finished. One rank's vote stops all ranks, at the same step."""
        self.stop_cause = cause

    def vote_to_save(self) -> None:
        """Let the run save a checkpoint at the next step at which all ranks know of the vote, and continue."""
        self.wants_save = True

    def save_evaluated(self) -> None:
        """Let the run save a checkpoint at this step, which has an evaluation. All ranks must call this method."""
        self.saves_evaluated = True

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps of this callback, as plain JSON values. The state of rank 0 is saved."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; called at a resume and at a roll-back."""
