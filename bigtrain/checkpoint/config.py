"""The `checkpoint` section of a run."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from pydantic import field_validator

from bigtrain.config import Duration, Section


class CheckpointConfig(Section):
    """When a run saves itself, and what it keeps."""

    every: Duration = Duration.steps(500)
    """Time between checkpoints, in steps, tokens or by the clock ("500 steps", "1e9 tokens", "15 min")."""

    at: tuple[Duration, ...] = ()
    """Lengths of training after which the run saves itself as well; those checkpoints are never pruned."""

    keep_last: Annotated[int, Ge(2)] = 3
    """How many of the newest verified checkpoints survive pruning."""

    asynchronous: bool = True
    """Write in the background, from a copy of the state in CPU memory, while training goes on."""

    max_failed_saves: Annotated[int, Ge(1)] = 3
    """Failed saves in a row after which the run warns loudly (and ends, if `stop_unsaved`)."""

    stop_unsaved: bool = False
    """End the run, resumable, after `max_failed_saves`, instead of training on unsaved."""

    @field_validator("at")
    @classmethod
    def _are_lengths_of_training(cls, value: tuple[Duration, ...]) -> tuple[Duration, ...]:
        for one in value:
            if one.is_time or one.value <= 0:
                raise ValueError(f"'{one}' is no length of training: use steps, tokens or epochs")
        return value

    @field_validator("every")
    @classmethod
    def _is_an_interval(cls, value: Duration) -> Duration:
        if value.unit not in ("steps", "tokens") and not value.is_time:
            raise ValueError(f"'{value}' is no interval between checkpoints: use steps, tokens or a time")
        if value.value <= 0:
            raise ValueError(f"'{value}' must be more than nothing")
        return value
