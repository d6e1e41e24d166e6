"""The `tracking` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from bigtrain.config import Duration, Section


class TrackingConfig(Section):
    """What a run records while it trains, and where to."""

    every: Duration = Duration.steps(1)
    """Time between logged steps, in steps ("10 steps")."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: auto is online with a key in WANDB_API_KEY or the netrc file, else offline."""

    project: str = "bigtrain"
    """W&B project that the run belongs to."""

    entity: str | None = None
    """W&B user or team; null is the key's own."""

    tags: list[str] = Field(default_factory=list)
    """W&B tags of the run."""

    group: str | None = None
    """W&B group, which holds the runs of a sweep together."""

    facts: dict[str, str | int | float] = Field(default_factory=dict)
    """More keys of the W&B run's config, beside those of the run itself."""

    @field_validator("every")
    @classmethod
    def _in_steps(cls, value: Duration) -> Duration:
        if value.unit != "steps" or value.value < 1:
            raise ValueError(f"'{value}' must be a number of steps, at least '1 step'")
        return value
