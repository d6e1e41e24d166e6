"""The `tracking` section, and what every tracker is.

A tracker is one file in trackers/ (or a plugin's): a `TrackerConfig` with its keys, and the `Tracker` that it opens. It
runs in a process of its own, so whatever it does, no training step waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, field_validator

from bigtrain.config import Duration, Registry, Section

PICTURE_KEY: Final = "_picture"
"""Of the mapping that stands for a picture in a tracker's row; its value is the place of a PNG file."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker may know of its run."""

    directory: Path
    name: str
    config: Mapping[str, Any]
    """The resolved config, without secrets."""


class Tracker:
    """An open tracker, in its own process. It may raise, block and print: the training does not notice."""

    def log(self, row: dict[str, Any]) -> None:
        """Take one object of metrics.jsonl: `step`, and values by name, where a value that is not finite is null.

        After an evaluation it may also hold pictures: {"pictures/TITLE": {"_picture": FILE}}.
        """

    def alert(self, title: str, text: str, level: str) -> None:
        """Tell the user that the run has ended."""

    def close(self, failed: bool) -> None:
        """Finish what was begun."""


class TrackerConfig(Section):
    """What all trackers share; a tracker adds its keys and `open`."""

    label: ClassVar[str] = "the tracker"
    """What messages call it."""
    advice: ClassVar[str] = ""
    """How what it has written to the run's directory is sent later, for messages."""

    name: str
    """Which tracker: a file of bigtrain/tracking/trackers, or the name of a plugin's class."""

    def starts(self, run: TrackedRun) -> list[dict[str, Any]]:
        """The ways to start, tried in this order: plain values that are passed to `open`. None: it is off."""
        return [{}]

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables of the tracker's process; `folder`: its own in the run's directory."""
        return {}

    def open(self, run: TrackedRun, start: dict[str, Any]) -> Tracker:
        """The tracker, in its own process; raises where it cannot start. Import its library here."""
        raise NotImplementedError


TRACKERS = Registry("tracker", TrackerConfig, package="bigtrain.tracking.trackers", where="tracking.trackers")


class TrackingConfig(Section):
    """What a run records while it trains, and where to."""

    every: Duration = Duration.steps(1)
    """Time between logged steps, in steps ("10 steps")."""

    trackers: tuple[Annotated[TrackerConfig, TRACKERS], ...] = ()
    """Trackers beside Weights & Biases: [{name: tensorboard}]."""

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
    """More keys of the config that trackers show, beside those of the run itself."""

    def all_trackers(self) -> list[TrackerConfig]:
        """Weights & Biases by its own keys, and `trackers`."""
        keys = {"project": self.project, "entity": self.entity, "tags": self.tags, "group": self.group}
        return [TRACKERS["wandb"].model_validate({"name": "wandb", "mode": self.wandb, **keys}), *self.trackers]

    @field_validator("every")
    @classmethod
    def _in_steps(cls, value: Duration) -> Duration:
        if value.unit != "steps" or value.value < 1:
            raise ValueError(f"'{value}' must be a number of steps, at least '1 step'")
        return value

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, value: tuple[TrackerConfig, ...]) -> tuple[TrackerConfig, ...]:
        names = [tracker.name for tracker in value]
        if "wandb" in names:
            raise ValueError("Weights & Biases has keys of its own: set tracking.wandb")
        if len(names) != len(set(names)):
            raise ValueError("a tracker is named twice")
        return value
