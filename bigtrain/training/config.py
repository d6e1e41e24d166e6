"""The `evaluation` and `init` sections."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge

from bigtrain.config import Count, Duration, Section


class EvaluationConfig(Section):
    """When the held-out loss is measured, and on how much."""

    every: Duration = Duration.steps(250)
    """Training between evaluations, in steps, tokens or epochs; the last step is always evaluated."""

    batches: Annotated[Count, Ge(1)] = 20
    """Global batches of each evaluation, the same ones every time; at most the whole of the validation data."""


class InitConfig(Section):
    """Where the state before the first step comes from."""

    source: str | None = None
    """RUN@STEP, a run's name (its newest checkpoint) or a checkpoint's directory; null: drawn from the seed."""

    state: Literal["weights", "weights+optimizer", "all"] = "weights"
    """What is taken: all means the step and the position in the data too, so that the run is a branch of the other."""
