"""Callbacks: what sees each event of the loop, may record metrics, and may vote to save or to stop.

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
    """One finished step, as callbacks see it; equal on all ranks but for the times."""

    number: int
    """Steps done, this one included."""

    batch: StepBatch
    lr: float
    loss_sum: float
    weight: float
    gradient_norm: float
    seconds: float
    data_wait_s: float
    skipped: bool = False
    """Whether nothing was updated: loss or gradient were not finite, or no token counted."""
    loss_scale: float | None = None
    """FP16's."""
    metrics: Mapping[str, Value] = field(default_factory=dict)
    """What was recorded by name, over all ranks."""
    evaluation: dict[str, float | None] = field(default_factory=dict)
    """Held-out metrics (`val_...`), where this step was followed by an evaluation."""
    units: Mapping[str, str] = field(default_factory=dict)
    """Units of these, where they have one."""
    pictures: dict[str, str] = field(default_factory=dict)
    """PNG files that callbacks of an `order` below 20 have written, by title: trackers get them with this step."""

    @property
    def loss(self) -> float | None:
        """The mean loss; None where no token counted."""
        return self.loss_sum / self.weight if self.weight else None

    def held_out(self, metric: str, where: str) -> float | None:
        """A metric of this step's evaluation; None where nothing counted, or its value is not finite.

        Raises:
            UserError: The evaluation gives no such metric; `where` is the key that names it.
        """
        if metric not in self.evaluation:
            raise UserError(
                f"No evaluation gives the metric '{metric}'",
                where,
                f"Known: {', '.join(self.evaluation)}. Others come with evaluation.evaluators.",
            )
        value = self.evaluation[metric]
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class CallbackContext:
    """What a callback may know of its run."""

    engine: Engine
    directory: Path
    """The run's."""
    total_steps: int
    rank: int
    world_size: int
    device: torch.device
    prepared: Prepared
    """The run's config, and its data."""


class Callback:
    """Sees the events of the loop, on every rank; callbacks run in the order of `order`.

    `bigtrain.metrics.record_metric` may be called in every event: the next step reduces the value over all ranks. The
    newest value of a rank counts. Of two steps after an evaluation or a save, the second one has no value.
    """

    order: int = 50

    key: str = ""
    """The name under which `state` is saved."""

    stop_cause: str | None = None
    """Why this callback wants the run to end, where it does."""

    wants_save: bool = False
    """Whether this callback wants a checkpoint."""

    saves_evaluated: bool = False
    """Whether this callback wants a checkpoint of the step that was evaluated last."""

    def on_start(self, progress: Progress) -> None:
        """Before the first step of this process."""

    def on_step(self, step: Step, progress: Progress) -> None:
        """After each step, in order; after its evaluation, where it has one."""

    def on_save(self, progress: Progress) -> None:
        """After a checkpoint has been taken; it may still be on its way to the disk."""

    def on_roll_back(self, progress: Progress) -> None:
        """After a roll-back: the steps after `progress.step` will be trained again, on other batches."""

    def on_end(self, outcome: enum.Enum, progress: Progress) -> None:
        """After the last step, when everything is saved."""

    def vote_to_stop(self, cause: str) -> None:
        """Let the run save itself and end as finished; all ranks stop at the same step, also if one alone votes."""
        self.stop_cause = cause

    def vote_to_save(self) -> None:
        """Let the run save itself at the next step that all ranks can agree on, and go on."""
        self.wants_save = True

    def save_evaluated(self) -> None:
        """Let the run save itself at this step, which was followed by an evaluation; to be called on all ranks."""
        self.saves_evaluated = True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback, plain values for JSON; rank 0's is saved."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned: at a resume and at a roll-back."""
