"""The config section `checkpoint`."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import field_validator

from bigtrain.config import Duration, Section
from bigtrain.storage.scheme import check_url


class BestConfig(Section):
    """Which checkpoints are kept for the value of a held-out metric. A step whose evaluation is one of the best is
    saved, and RUN@best names the best checkpoint."""

    metric: str = "val_loss"
    """Name of an evaluation metric, as in metrics.jsonl."""

    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger values are better."""

    keep: Annotated[int, Ge(1)] = 1
    """How many of the best checkpoints survive pruning, in addition to the newest ones."""


class CheckpointConfig(Section):
    """When a run saves checkpoints, and which of them it keeps."""

    every: Duration = Duration.steps(500)
    """Interval between checkpoints, in steps, tokens or wall time ("500 steps", "1e9 tokens", "15 min")."""

    at: tuple[Duration, ...] = ()
    """Steps, tokens or epochs after which an additional checkpoint is saved; these checkpoints are never pruned."""

    keep_last: Annotated[int, Ge(2)] = 3
    """How many of the newest verified checkpoints survive pruning, in addition to the permanent ones."""

    permanent: Duration | None = None
    """Interval, in steps or tokens, between checkpoints that are never pruned; null: none. It need not be a multiple of
    `every`."""

    best: BestConfig | None = None
    """Keep the best checkpoints by a held-out metric: {metric: val_loss, mode: min, keep: 1}; null: none."""

    asynchronous: bool = True
    """Write checkpoints in the background, from a copy of the state in CPU memory, while training continues."""

    read_back: bool = True
    """Read each new checkpoint back from the disk and compare it with its hashes, before older ones are pruned."""

    check_replicas: bool = False
    """Before each save, compare the copies of the same weights that several ranks hold. If a bit differs, the attempt
    ends, and the run resumes from the checkpoint before."""

    storage: str | None = None
    """URL prefix of an object store (s3://, gs://, or the scheme of a plugin). Each saved checkpoint is uploaded there
    in the background, under the run's name. Credentials come from the environment. null: no uploads."""

    max_failed_saves: Annotated[int, Ge(1)] = 3
    """Number of saves, or of uploads, that fail in a row before the run logs an error (and ends, if `stop_unsaved`)."""

    stop_unsaved: bool = False
    """After `max_failed_saves` failures, end the run, which can be resumed, instead of training without checkpoints."""

    @field_validator("at")
    @classmethod
    def _are_lengths_of_training(cls, value: tuple[Duration, ...]) -> tuple[Duration, ...]:
        for one in value:
            if one.is_time or one.value <= 0:
                raise ValueError(f"'{one}' is not a training length: use steps, tokens or epochs")
        return value

    @field_validator("storage")
    @classmethod
    def _is_an_object_store(cls, value: str | None) -> str | None:
        return None if value is None else check_url(value, stores=True)

    @field_validator("every")
    @classmethod
    def _is_an_interval(cls, value: Duration) -> Duration:
        if value.unit not in ("steps", "tokens") and not value.is_time:
            raise ValueError(f"'{value}' is not an interval between checkpoints: use steps, tokens or a time")
        if value.value <= 0:
            raise ValueError(f"'{value}' must be greater than zero")
        return value

    @field_validator("permanent")
    @classmethod
    def _is_counted_in_training(cls, value: Duration | None) -> Duration | None:
        if value is not None and (value.unit not in ("steps", "tokens") or value.value <= 0):
            raise ValueError(f"'{value}' is not an interval between permanent checkpoints: use steps or tokens")
        return value
