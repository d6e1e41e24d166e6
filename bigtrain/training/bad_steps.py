"""The policy for bad steps: when a run rolls back or stops, and from which step it continues.

The policy's inputs are equal on all ranks, and its state is saved in each checkpoint. So all ranks take the same
decision, and a resumed run takes it again.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from bigtrain.engines.contract import StepNumbers
from bigtrain.training.config import BadStepsConfig


class BadStepsError(RuntimeError):
    """The run had more bad steps than the config allows, or has no checkpoint to roll back to."""


@dataclass
class Record:
    """The state of the policy, saved in every checkpoint."""

    skipped: int = 0
    """Number of steps that updated nothing."""

    in_a_row: int = 0
    """Number of consecutive latest steps that updated nothing and count towards the limit."""

    roll_backs: int = 0

    left_out: int = 0
    """Number of batches that roll-backs have skipped. Step s, counted from 0, consumes batch s + left_out."""

    seen: int = 0
    """Number of steps that `mean` and `variance` cover."""

    mean: float = 0.0
    """Running mean of the loss."""

    variance: float = 0.0
    """Running variance of the loss."""

    def as_plain(self) -> dict[str, Any]:
        """Plain values for a checkpoint's manifest."""
        return asdict(self)


@dataclass(frozen=True)
class RollBack:
    """A request to resume from an older checkpoint."""

    step: int
    """The bad step, counted from 1."""
    first: int
    """The first of the consecutive bad steps; the restored checkpoint must be older."""
    wanted: int
    """The newest step whose checkpoint is old enough (`bad_steps.rewind`)."""
    cause: str


class Policy:
    """Judges each step; see the module's docstring."""

    def __init__(self, config: BadStepsConfig) -> None:
        self.config = config

    def judge(self, record: Record, step: int, numbers: StepNumbers) -> RollBack | None:
        """Add a step to the record, and return a request where the run should roll back.

        Args:
            step: The number of the step, counted from 1.

        Raises:
            BadStepsError: The limit of bad steps is reached and the config says to stop, or a roll-back is due and the
                run has already made as many as the config allows.
        """
        request = self._skipped(record, step, numbers) if numbers.skipped else self._spiked(record, step, numbers)
        if request is not None and record.roll_backs >= self.config.max_roll_backs:
            count = record.roll_backs
            raise BadStepsError(f"{request.cause}; the run has already rolled back {count} times. {_ADVICE}")
        return request

    def after(self, record: Record, request: RollBack, restored: Record, step: int) -> Record:
        """The record after a roll-back.

        Args:
            record: The record before the roll-back.
            restored: The record in the checkpoint.
            step: The checkpoint's step.
        """
        consumed = request.step + record.left_out
        restored.left_out = consumed + self.config.skip - step
        restored.roll_backs = record.roll_backs + 1
        return restored

    def _skipped(self, record: Record, step: int, numbers: StepNumbers) -> RollBack | None:
        record.skipped += 1
        if numbers.overflowed:
            return None
        record.in_a_row += 1
        if record.in_a_row < self.config.limit:
            return None
        lacked = "finite gradient" if numbers.weight else "sample with a weight"
        cause = f"{record.in_a_row} steps in a row had no {lacked}, the last one step {step}"
        if self.config.then == "stop":
            raise BadStepsError(f"{cause}. {_ADVICE}")
        return self._request(step, step - record.in_a_row + 1, cause)

    def _spiked(self, record: Record, step: int, numbers: StepNumbers) -> RollBack | None:
        record.in_a_row = 0
        if self.config.spike is None:
            return None
        loss, deviation = numbers.loss / numbers.weight, math.sqrt(record.variance)
        if record.seen >= self.config.window and loss > record.mean + self.config.spike * deviation:
            cause = (
                f"the loss of step {step} is {loss:.4g}, but the {self.config.window} steps before it had a mean of "
                f"{record.mean:.4g} and a deviation of {deviation:.2g}"
            )
            return self._request(step, step, cause)
        record.seen += 1
        # First the mean over all steps, then an exponential moving average (West 1979).
        share = 1.0 / min(record.seen, self.config.window)
        difference = loss - record.mean
        record.mean += share * difference
        record.variance = (1.0 - share) * (record.variance + share * difference**2)
        return None

    def _request(self, step: int, first: int, cause: str) -> RollBack:
        return RollBack(step, first, min(first - 1, step - self.config.rewind), cause)


_ADVICE = "Lower optimizer.lr, lengthen schedule.warmup, or set optimizer.clip."
