"""What a run trains on (`data`), and how it is read (`streaming`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import field_validator

from bigtrain.config import Section


class DataConfig(Section):
    """What is trained on: part of a run's identity, by the data's fingerprint and not by its place."""

    train: str
    """A directory of shards, as `bigtrain data pack` or `bigtrain data index` leaves it."""

    validation: str | None = None
    """A directory of held-out shards; null where the run is not evaluated."""

    document_mask: bool = False
    """Whether a token sees only its own document inside a packed sequence."""

    shuffle_window: Annotated[int, Ge(1)] = 8
    """Shards whose sequences are mixed with each other; a shard is read inside one window an epoch."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _one_local_directory(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple, dict)):
            raise ValueError("several sources are not mixed: give the path of one shard directory")
        if isinstance(value, str) and "://" in value:
            raise ValueError(f"{value!r} is a URL: give the path of a local shard directory")
        if isinstance(value, str) and not value.strip():
            raise ValueError("the path of the shard directory is empty")
        return value


class StreamingConfig(Section):
    """How the data is read: changes nothing of what is trained."""

    verify: Literal["auto", "always", "never"] = "auto"
    """Hashing every shard at the start: auto does so up to 4 GB; beyond it, and never, sizes only."""

    log_samples: bool = False
    """Whether the samples of each step are recorded in samples.jsonl."""

    prefetch: Annotated[int, Ge(1)] = 2
    """Steps that a background thread prepares ahead."""
