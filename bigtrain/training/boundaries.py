"""The steps after which a run evaluates or saves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Boundaries:
    """The steps after which a run evaluates or saves a checkpoint; equal on all ranks."""

    total_steps: int
    evaluate_every: int | None
    save_every: int | None
    keep_every: int | None = None
    """Steps between permanent checkpoints."""
    keep_at: frozenset[int] = frozenset()
    """Further steps whose checkpoints are permanent."""

    def evaluates(self, step: int) -> bool:
        """Whether the held-out loss is measured after `step` steps."""
        if self.evaluate_every is None:
            return False
        return step % self.evaluate_every == 0 or step == self.total_steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        due = self.save_every is not None and step % self.save_every == 0
        return step == self.total_steps or due or self.keeps(step)

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint after `step` steps is never pruned."""
        return step in self.keep_at or (self.keep_every is not None and step % self.keep_every == 0)
