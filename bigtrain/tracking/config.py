"""The section `tracking`, and the base classes of trackers.

A tracker is one file in trackers/ or a plugin: a `TrackerConfig` with its keys, and the `Tracker` that it opens. Each
tracker runs in a separate process, so no training step waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, field_validator

from bigtrain.config import Duration, Registry, Section

PICTURE_KEY: Final = "_picture"
"""Key of a mapping that represents an image in a tracker's row; its value is the path of a PNG file."""


@dataclass(frozen=True)
class TrackedRun:
    """The information about a run that its trackers receive."""

    directory: Path
    name: str
    config: Mapping[str, Any]
    """The resolved config; in the tracker's process it contains no secrets."""


class Tracker:
    """An open tracker, in its own process. It may raise exceptions, block or print without any effect on training."""

    def log(self, row: dict[str, Any]) -> None:
        """Log one object of metrics.jsonl: `step`, and values by name; values that are not finite are None.

        After an evaluation the object may also contain images: {"pictures/TITLE": {"_picture": FILE}}.
        """

    def alert(self, title: str, text: str, level: str) -> None:
        """Notify the user that the run has ended; `level` is "INFO", or "ERROR" for a failed run."""

    def close(self, failed: bool) -> None:
        """Finish the tracker's output; `failed`: whether the run has failed."""


class TrackerConfig(Section):
    """Base of the sections of trackers; a subclass adds its keys and `open`."""

    label: ClassVar[str] = "the tracker"
    """Name of the tracker in messages."""
    advice: ClassVar[str] = ""
    """For messages: how to upload later what the tracker has written to the run's directory."""

    name: str
    """Name of the tracker: a file of bigtrain/tracking/trackers, or the name of a plugin's class."""

    def starts(self, run: TrackedRun) -> list[dict[str, Any]]:
        """The alternatives to start the tracker, tried in this order; an empty list: the tracker is off.

        Each is a mapping of JSON values, which is passed to `open` as `start`.
        """
        return [{}]

    def environment(self, folder: Path) -> dict[str, str]:
        """Environment variables for the tracker's process; `folder` is the tracker's folder in the run's directory."""
        return {}

    def open(self, run: TrackedRun, start: dict[str, Any]) -> Tracker:
        """Open the tracker; called in its own process. Import the tracker's library here.

        Args:
            run: The run to track.
            start: One of the mappings that `starts` returned.

        Raises:
            Exception: The tracker cannot start. The next of `starts` is tried.
        """
        raise NotImplementedError


TRACKERS = Registry("tracker", TrackerConfig, package="bigtrain.tracking.trackers", where="tracking.trackers")


class TrackingConfig(Section):
    """How often a run logs metrics, and to which trackers."""

    every: Duration = Duration.steps(1)
    """Interval between logged steps, in steps ("10 steps")."""

    trackers: tuple[Annotated[TrackerConfig, TRACKERS], ...] = ()
    """Trackers in addition to Weights & Biases: [{name: tensorboard}]."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Mode of Weights & Biases. auto: WANDB_MODE if set; online with a key (WANDB_API_KEY, netrc); else offline."""

    project: str = "bigtrain"
    """W&B project of the run."""

    entity: str | None = None
    """W&B user or team that owns the project; null: the default of the API key."""

    tags: list[str] = Field(default_factory=list)
    """W&B tags of the run."""

    group: str | None = None
    """W&B group of the run, such as the sweep to which it belongs."""

    facts: dict[str, str | int | float] = Field(default_factory=dict)
    """Additional entries for the config that trackers show."""

    def all_trackers(self) -> list[TrackerConfig]:
        """The section of Weights & Biases, made from its keys here, and the `trackers`."""
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
            raise ValueError("Weights & Biases has its own keys: set tracking.wandb")
        if len(names) != len(set(names)):
            raise ValueError("a tracker is named twice")
        return value
