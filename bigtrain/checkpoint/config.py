"""The `checkpoint` section of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import field_validator

from bigtrain.config import Duration, Section
from bigtrain.storage.scheme import check_url


class BestConfig(Section):
    """Which checkpoints are kept for the value of a held-out metric. A step whose evaluation is one of the best is
    saved, and RUN@best names the best one."""

    metric: str = "val_loss"
    """A metric of the evaluations, as metrics.jsonl names it."""

    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger values are better."""

    keep: Annotated[int, Ge(1)] = 1
    """How many of the best checkpoints survive pruning, beside the newest ones."""


class CheckpointConfig(Section):
    """When a run saves itself, and what it keeps."""

    every: Duration = Duration.steps(500)
    """Time between checkpoints, in steps, tokens or by the clock ("500 steps", "1e9 tokens", "15 min")."""

    at: tuple[Duration, ...] = ()
    """Lengths of training after which the run saves itself as well; those checkpoints are never pruned."""

    keep_last: Annotated[int, Ge(2)] = 3
    """How many of the newest verified checkpoints survive pruning, beside the permanent ones."""

    permanent: Duration | None = None
    """Steps or tokens between checkpoints that are never pruned; null: none are. They need not be multiples of
    `every`."""

    best: BestConfig | None = None
    """Keep the best checkpoints by a held-out metric: {metric: val_loss, mode: min, keep: 1}; null: none."""

    asynchronous: bool = True
    """Write in the background, from a copy of the state in CPU memory, while training goes on."""

    read_back: bool = True
    """Compare each new checkpoint with its hashes, from the disk, before it counts and older ones are pruned."""

    check_replicas: bool = False
    """Before each save, compare the copies that ranks hold of the same weights: a flipped bit ends the attempt, and the
    run goes on from the checkpoint before."""

    storage: str | None = None
    """URL of a bucket's prefix (s3://, gs://, or a scheme of your own) to which each checkpoint is uploaded in the
    background, under the run's name, once it is saved here; credentials come from the environment. null: nowhere."""

    max_failed_saves: Annotated[int, Ge(1)] = 3
    """Failed saves, or uploads, in a row after which the run warns loudly (and ends, if `stop_unsaved`)."""

    stop_unsaved: bool = False
    """End the run, resumable, after `max_failed_saves`, instead of training on unsaved."""

    @field_validator("at")
    @classmethod
    def _are_lengths_of_training(cls, value: tuple[Duration, ...]) -> tuple[Duration, ...]:
        for one in value:
            if one.is_time or one.value <= 0:
                raise ValueError(f"'{one}' is no length of training: use steps, tokens or epochs")
        return value

    @field_validator("storage")
    @classmethod
    def _is_an_object_store(cls, value: str | None) -> str | None:
        return None if value is None else check_url(value, stores=True)

    @field_validator("every")
    @classmethod
    def _is_an_interval(cls, value: Duration) -> Duration:
        if value.unit not in ("steps", "tokens") and not value.is_time:
            raise ValueError(f"'{value}' is no interval between checkpoints: use steps, tokens or a time")
        if value.value <= 0:
            raise ValueError(f"'{value}' must be more than nothing")
        return value

    @field_validator("permanent")
    @classmethod
    def _is_counted_in_training(cls, value: Duration | None) -> Duration | None:
        if value is not None and (value.unit not in ("steps", "tokens") or value.value <= 0):
            raise ValueError(f"'{value}' is no interval between permanent checkpoints: use steps or tokens")
        return value
