"""The `evaluation` and `init` sections."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import field_validator

from bigtrain.config import Count, Duration, Section


class EvaluationConfig(Section):
    """When the held-out loss is measured, and on how much."""

    every: Duration = Duration.steps(250)
    """Training between evaluations, in steps, tokens or epochs; the last step is always evaluated."""

    batches: Annotated[Count, Ge(1)] = 20
    """Global batches of each evaluation, the same ones every time; at most the whole of the validation data."""

    @field_validator("every")
    @classmethod
    def _is_a_length_of_training(cls, value: Duration) -> Duration:
        if value.is_time or value.value <= 0:
            raise ValueError(f"'{value}' is no interval between evaluations: use steps, tokens or epochs")
        return value


class InitConfig(Section):
    """Where the state before the first step comes from."""

    source: str | None = None
    """RUN@STEP, or RUN for its newest checkpoint, by name or path, also of what `checkpoint import` wrote; null: drawn
    from the seed."""

    hash: str | None = None
    """Hash of that checkpoint's manifest; a run writes it into its resolved config, and holds to it."""

    state: Literal["weights", "weights+optimizer", "all"] = "weights"
    """What is taken: all means the step and the position in the data too, so that the run is a branch of the other."""
