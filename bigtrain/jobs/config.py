"""The `job` section: nodes and processes, restarts, hang detection and notifications."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from bigtrain.config import NUMBER_OR_TEXT, Duration, Section


def _seconds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    duration = Duration.parse(value)
    if not duration.is_time:
        raise ValueError(f"{value!r} is not a time: write seconds (300), or for example '5 min'")
    return duration.seconds


Seconds = Annotated[float, BeforeValidator(_seconds), NUMBER_OR_TEXT, Field(gt=0)]
"""A time as a number of seconds (300) or as a text with a unit ("5 min")."""


class LimitsConfig(Section):
    """How long a rank may go without a heartbeat before it counts as hanging, for each phase."""

    start: Seconds = 600.0
    """Limit from the start of the process to the first step: imports, building and compiling the model, loading."""

    step: Seconds = 300.0
    """Limit during a training step, and while waiting for data."""

    save: Seconds = 600.0
    """Limit while a checkpoint is saved, and while the run stops."""

    evaluation: Seconds = 600.0
    """Limit during an evaluation."""

    def by_phase(self) -> dict[str, float]:
        """The limit in seconds for each phase of `bigtrain.heartbeat.PHASES`."""
        return {
            "start": self.start,
            "step": self.step,
            "data": self.step,
            "save": self.save,
            "stopping": self.save,
            "evaluation": self.evaluation,
        }


class ScriptConfig(Section):
    """How long the ranks of a user's own script may take to end; bigtrain does not know what such a script does."""

    stop: Seconds = 30.0
    """Time between SIGTERM and SIGKILL when the run is stopped; torchrun uses 30 s too."""

    exit: Seconds | None = None
    """Time that the other ranks get to end after the first rank ended, before the run fails; null: no limit."""


class NotifyConfig(Section):
    """Where a message is sent when the run has ended; bigtrain/jobs/notify.py describes the message."""

    command: Annotated[list[str], Field(min_length=1)] | None = None
    """A program and its arguments; it reads the message from standard input."""

    webhook: str | None = None
    """URL to which the message is posted. If the URL is a secret, use `webhook_variable` instead."""

    webhook_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Name of the environment variable that holds the webhook's URL."""

    wandb: bool = False
    """Whether W&B sends an alert, by e-mail or Slack as set in your W&B account."""

    @field_validator("webhook")
    @classmethod
    def _holds_no_secret(cls, value: str | None) -> str | None:
        if value is None:
            return value
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it must be an http or https URL")
        if "@" in parts.netloc or parts.query:
            raise ValueError(
                "user info and queries may be secrets: set a variable to the URL and webhook_variable to its name"
            )
        return value

    @model_validator(mode="after")
    def _names_someone(self) -> NotifyConfig:
        if self.webhook is not None and self.webhook_variable is not None:
            raise ValueError("give webhook or webhook_variable, not both")
        if not (self.command or self.webhook or self.webhook_variable or self.wandb):
            raise ValueError("name a command, a webhook, a webhook_variable or wandb: true")
        return self


class JobConfig(Section):
    """On which nodes the processes of a run start, and what happens when one of them fails."""

    nodes: Annotated[int, Field(ge=1)] = 1
    """Number of nodes that the run uses."""

    min_nodes: Annotated[int, Field(ge=1)] | None = None
    """Smallest number of nodes with which the run continues after others are lost, if the layout allows that number;
    null: the run needs all `nodes`."""

    procs_per_node: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Processes on each node; auto: one for each GPU, or 1 on a node without GPUs."""

    placer: str = "auto"
    """What provides the nodes: local, slurm, ray or the name of a plugin's placer; auto: slurm inside a Slurm job,
    otherwise local. A run that is submitted to a Ray cluster always uses ray."""

    max_failures: Annotated[int, Field(ge=0)] = 3
    """Number of restarts without a new checkpoint in between, after which the run counts as failed."""

    labels: Mapping[str, str] = Field(default_factory=dict)
    """Labels that a cluster node must have to be used, for example {"ray.io/accelerator-type": "H100"}."""

    topology: str | None = None
    """The label whose value is equal for nodes that are close to each other (a rack, an NVLink domain). The run uses
    nodes with as few different values as possible, and nodes with the same value get consecutive ranks."""

    limits: LimitsConfig = LimitsConfig()
    """Longest time without a heartbeat of a rank, for each phase."""

    script: ScriptConfig = ScriptConfig()
    """How long the ranks of a user's own script may take to end."""

    notify: NotifyConfig | None = None
    """Where a message is sent when the run has ended; null: nowhere."""

    @model_validator(mode="after")
    def _least_is_at_most_all(self) -> JobConfig:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes is {self.min_nodes}, more than nodes, which is {self.nodes}")
        return self

    @property
    def least_nodes(self) -> int:
        """The smallest number of nodes with which the run continues."""
        return self.nodes if self.min_nodes is None else self.min_nodes
