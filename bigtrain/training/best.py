"""Saves the steps whose evaluation is among the best, and records the value in each checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigtrain.checkpoint.best import KEY, record_of
from bigtrain.checkpoint.config import BestConfig
from bigtrain.training.callback import Callback, Step
from bigtrain.training.progress import Progress


class KeepBest(Callback):
    """Requests a checkpoint of each step that is among the best so far. Pruning reads the values from the manifests.

    All ranks receive the same values and decide alike. The values so far are saved in the checkpoints, so a resumed
    run saves the same steps as an uninterrupted one.
    """

    order = 10
    key = KEY

    def __init__(self, rule: BestConfig) -> None:
        self._rule = rule
        self._best: list[tuple[float, int]] = []
        self._value: float | None = None

    def on_step(self, step: Step, progress: Progress) -> None:
        """Record the value of an evaluation, and request a checkpoint if the value is among the best."""
        self._value = None
        if not step.evaluation:
            return
        self._value = step.held_out(self._rule.metric, "checkpoint.best.metric")
        if self._value is None:
            return
        sign = 1 if self._rule.mode == "min" else -1
        found = sorted([*self._best, (self._value, step.number)], key=lambda row: (sign * row[0], row[1]))
        self._best = found[: self._rule.keep]
        if (self._value, step.number) in self._best:
            self.save_evaluated()

    def on_roll_back(self, progress: Progress) -> None:
        """Forget the values of the steps that the roll-back undoes."""
        self._best = [row for row in self._best if row[1] <= progress.step]

    def state(self) -> dict[str, Any]:
        """The rule, the value of the step that is saved, and the best values so far."""
        return {**record_of(self._rule, self._value), "so_far": [list(row) for row in self._best]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the values so far, unless they belong to another metric or mode."""
        if (state["metric"], state["mode"]) == (self._rule.metric, self._rule.mode):
            self._best = [(float(value), int(step)) for value, step in state["so_far"]][: self._rule.keep]
