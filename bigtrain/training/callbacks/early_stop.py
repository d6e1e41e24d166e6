"""Ends a run whose held-out metric no longer improves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge

from bigtrain.config import Count
from bigtrain.training.callback import Callback, CallbackContext, Step
from bigtrain.training.config import CALLBACKS, CallbackConfig


@CALLBACKS.register
class EarlyStopConfig(CallbackConfig):
    """Ends the run, as finished, after `patience` evaluations in a row without an improvement."""

    name: Literal["early_stop"] = "early_stop"
    metric: str = "val_loss"
    """A held-out metric, as metrics.jsonl names it."""
    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger values are better."""
    patience: Annotated[Count, Ge(1)] = 3
    """Evaluations in a row without an improvement after which the run ends."""
    min_delta: Annotated[float, Ge(0)] = 0.0
    """A change must be larger than this to be an improvement."""

    def build(self, context: CallbackContext) -> Callback:
        """Build the callback. All ranks receive the same values, so they vote alike."""
        return _EarlyStop(self)


class _EarlyStop(Callback):
    def __init__(self, config: EarlyStopConfig) -> None:
        self._config = config
        self._best: float | None = None
        self._best_step = 0
        self._waited = 0

    def on_step(self, step: Step, progress: Any) -> None:
        if not step.evaluation:
            return
        config = self._config
        value = step.held_out(config.metric, "callbacks.early_stop.metric")
        if value is not None and self._improves(value):
            self._best, self._best_step, self._waited = value, step.number, 0
            return
        self._waited += 1
        if self._waited >= config.patience:
            best = "nothing" if self._best is None else f"{self._best:.6g} at step {self._best_step}"
            self.vote_to_stop(f"{config.metric} has not improved on {best} in {self._waited} evaluations")

    def _improves(self, value: float) -> bool:
        if self._best is None:
            return True
        gain = self._best - value if self._config.mode == "min" else value - self._best
        return gain > self._config.min_delta

    def state(self) -> dict[str, Any]:
        return {"best": self._best, "best_step": self._best_step, "waited": self._waited}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._best, self._best_step = state["best"], int(state["best_step"])
        self._waited = int(state["waited"])
