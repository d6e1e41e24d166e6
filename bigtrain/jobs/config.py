"""The `job` section: how many processes, how often to try again, how long to wait for a sign of life."""

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
"""A time: a number of seconds (300), or a text with its unit ("5 min")."""


class LimitsConfig(Section):
    """How long a rank may show no sign of life before it counts as hanging, by what it is doing."""

    start: Seconds = 600.0
    """From the start of the process to the first step: imports, building and compiling the model, loading."""

    step: Seconds = 300.0
    """Within a training step, or while waiting for data."""

    save: Seconds = 600.0
    """Within a save of a checkpoint, or while stopping."""

    evaluation: Seconds = 600.0
    """Within an evaluation."""

    def by_phase(self) -> dict[str, float]:
        """Seconds for each phase of `bigtrain.heartbeat.PHASES`."""
        return {
            "start": self.start,
            "step": self.step,
            "data": self.step,
            "save": self.save,
            "stopping": self.save,
            "evaluation": self.evaluation,
        }


class ScriptConfig(Section):
    """How the ranks of a script of your own end, which bigtrain cannot look into."""

    stop: Seconds = 30.0
    """Time to end after SIGTERM, before SIGKILL; torchrun gives 30 s as well."""

    exit: Seconds | None = None
    """Time for the other ranks to end after the first one did, before the run fails; null: no limit."""


class NotifyConfig(Section):
    """Where a message goes when the run has finished or failed; bigtrain/jobs/notify.py describes the message."""

    command: Annotated[list[str], Field(min_length=1)] | None = None
    """A program and its arguments; the message is its standard input."""

    webhook: str | None = None
    """URL to which the message is posted. One that is a secret belongs into `webhook_variable`."""

    webhook_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Name of the environment variable that holds the URL."""

    wandb: bool = False
    """Whether W&B alerts you, by mail or Slack as your account says."""

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
    """Where a run's processes go, and what happens when one fails."""

    nodes: Annotated[int, Field(ge=1)] = 1
    """Machines that the run takes."""

    min_nodes: Annotated[int, Field(ge=1)] | None = None
    """Machines with which it still goes on when others are lost, at sizes that the layout allows; null: all `nodes`."""

    procs_per_node: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Processes on each machine; auto: one a GPU, else 1."""

    placer: str = "auto"
    """Who gives the machines: local, slurm, ray or a plugin's; auto: the Slurm job that it is started in, else this
    machine. A submission to a cluster is always placed by ray."""

    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts without a new checkpoint between them before the run counts as failed."""

    labels: Mapping[str, str] = Field(default_factory=dict)
    """Labels that a cluster's node must carry to be taken, for example {"ray.io/accelerator-type": "H100"}."""

    topology: str | None = None
    """The label whose value says which nodes are near each other (a rack, an NVLink domain): few values are used, and
    ranks are given out one value after the other."""

    limits: LimitsConfig = LimitsConfig()
    """Longest silence of a rank, by phase."""

    script: ScriptConfig = ScriptConfig()
    """How the ranks of a script of your own end."""

    notify: NotifyConfig | None = None
    """Where a message goes when the run has ended."""

    @model_validator(mode="after")
    def _least_is_at_most_all(self) -> JobConfig:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes is {self.min_nodes}, more than nodes, which is {self.nodes}")
        return self

    @property
    def least_nodes(self) -> int:
        """Nodes with which the run still goes on."""
        return self.nodes if self.min_nodes is None else self.min_nodes
