"""The policy for bad steps: which are too many or too high, and where a run goes on after them.

It looks at numbers that are equal on all ranks, and all that it remembers is in the checkpoint: ranks decide alike, and
a run that is killed decides again what it had decided.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from bigtrain.engines.contract import StepNumbers
from bigtrain.training.config import BadStepsConfig


class BadStepsError(RuntimeError):
    """The run has met more bad steps than it may."""


@dataclass
class Record:
    """What the policy remembers."""

    skipped: int = 0
    """Steps that updated nothing."""

    in_a_row: int = 0
    """Of the last steps, those that updated nothing and count towards the limit."""

    roll_backs: int = 0

    left_out: int = 0
    """Batches of the data that no step consumes: step s, from 0, consumes batch s + left_out."""

    seen: int = 0
    """Steps that mean and variance have seen."""

    mean: float = 0.0
    """Running mean of the loss."""

    variance: float = 0.0
    """Running variance of the loss."""

    def as_plain(self) -> dict[str, Any]:
        """For a checkpoint's manifest."""
        return asdict(self)


@dataclass(frozen=True)
class RollBack:
    """A request to go on from an older checkpoint."""

    step: int
    """The bad step, from 1."""
    first: int
    """The first of the bad steps in a row: a checkpoint must be older."""
    wanted: int
    """Step of the newest checkpoint that is old enough, where there is one."""
    cause: str


class Policy:
    """Judges each step; see the module's docstring."""

    def __init__(self, config: BadStepsConfig) -> None:
        self.config = config

    def judge(self, record: Record, step: int, numbers: StepNumbers) -> RollBack | None:
        """Take a step into the record, and say whether to roll back from it.

        Args:
            step: Steps done, this one included.

        Raises:
            BadStepsError: Too many bad steps, or too many roll-backs.
        """
        asked = self._skipped(record, step, numbers) if numbers.skipped else self._spiked(record, step, numbers)
        if asked is not None and record.roll_backs >= self.config.max_roll_backs:
            raise BadStepsError(f"{asked.cause}; the run has rolled back {record.roll_backs} times already. {_ADVICE}")
        return asked

    def after(self, record: Record, asked: RollBack, restored: Record, step: int) -> Record:
        """The record with which the run goes on.

        Args:
            record: Before the roll-back.
            restored: That of the checkpoint.
            step: Of the checkpoint.
        """
        consumed = asked.step + record.left_out
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
        lacked = "finite gradient" if numbers.weight else "token that counts"
        cause = f"{record.in_a_row} steps in a row had no {lacked}, the last one step {step}"
        if self.config.then == "stop":
            raise BadStepsError(f"{cause}. {_ADVICE}")
        return self._ask(step, step - record.in_a_row + 1, cause)

    def _spiked(self, record: Record, step: int, numbers: StepNumbers) -> RollBack | None:
        record.in_a_row = 0
        if self.config.spike is None:
            return None
        loss, deviation = numbers.loss / numbers.weight, math.sqrt(record.variance)
        if record.seen >= self.config.window and loss > record.mean + self.config.spike * deviation:
            cause = (
                f"the loss of step {step} is {loss:.4g}, where the {self.config.window} steps before had a mean of "
                f"{record.mean:.4g} and a deviation of {deviation:.2g}"
            )
            return self._ask(step, step, cause)
        record.seen += 1
        # The mean of all steps so far at first, and then one whose weights fade (West 1979).
        share = 1.0 / min(record.seen, self.config.window)
        difference = loss - record.mean
        record.mean += share * difference
        record.variance = (1.0 - share) * (record.variance + share * difference**2)
        return None

    def _ask(self, step: int, first: int, cause: str) -> RollBack:
        return RollBack(step, first, min(first - 1, step - self.config.rewind), cause)


_ADVICE = "Lower optimizer.lr, lengthen schedule.warmup, or set optimizer.clip."
