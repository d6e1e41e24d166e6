"""Base classes of the sections `optimizer` and `schedule` of a run's YAML.

An optimizer is one file in optimizers/, a schedule one file in schedules/; `--plugin` adds the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, field_validator, model_validator

from bigtrain.config import Duration, Registry, Section, UserError
from bigtrain.optim.clip import CLIPS, ClipConfig
from bigtrain.optim.clips.norm import NormClip

if TYPE_CHECKING:
    import torch

    from bigtrain.optim.schedule import Schedule

Fraction = Annotated[float, Ge(0), Lt(1)]
NonNegative = Annotated[float, Ge(0)]


class ParameterGroup(Section):
    """Settings for the parameters whose qualified names match a pattern, in place of the optimizer's settings."""

    pattern: str
    """A shell pattern over the full qualified name ("embedding.*", "*.bias"); the first group that matches applies."""
    lr_scale: NonNegative = 1.0
    """Factor by which the schedule's learning rate is multiplied."""
    weight_decay: NonNegative | None = None
    """Weight decay of the group, for parameters of any shape; null: the optimizer's weight decay, which applies only to
    parameters of two or more dimensions."""


class PartConfig(Section):
    """One part of a model with an optimizer and a loss of its own, such as the generator of a GAN."""

    parameters: tuple[str, ...] = ()
    """Shell patterns over the qualified names of the part's parameters; empty: `NAME.*` for a part called NAME."""
    optimizer: dict[str, Any] = Field(default_factory=dict)
    """Keys that differ from the `optimizer` section around it, such as {lr: 4e-4}. With another `name`, only `frozen`
    is inherited from that section."""
    schedule: dict[str, Any] | None = None
    """The part's schedule, with the keys of the section `schedule`; null: the run's schedule."""
    every: Annotated[int, Ge(1)] = 1
    """Interval between updates of the part, in steps: the last step of each interval updates it."""


class OptimizerConfig(Section):
    """Base class of all optimizers. A subclass adds its keys, `make` and `zero_state`.

    An optimizer must update each parameter from its own gradient and state by tensor operations. The engine fsdp then
    shards it without extra code: its parameters, gradients and state are DTensors.
    """

    elementwise: ClassVar[bool] = True
    """Whether the update of each element depends only on that element's gradient and state. The engine deepspeed
    flattens parameters, so it supports only such optimizers."""
    follows_mup: ClassVar[bool] = False
    """Whether muP's rule of learning rates (`model.mup`) is valid for this optimizer: the size of its updates does not
    depend on the size of the gradient, and its weight decay is decoupled."""

    name: str
    """Name of the optimizer: a file in bigtrain/optim/optimizers, or a class of a plugin."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Learning rate at the schedule's peak."""
    weight_decay: NonNegative = 0.0
    """Weight decay of parameters of two or more dimensions, unless a group sets another value."""
    clip: Annotated[ClipConfig, CLIPS] | None = NormClip()
    """Gradient clipping: a number, the largest global norm of the gradient; or a section with `name`, such as
    {name: value, max: 0.1}. null: no clipping."""
    groups: tuple[ParameterGroup, ...] = ()
    """Settings for groups of parameters, each selected by a pattern; see `ParameterGroup`."""
    frozen: tuple[str, ...] = ()
    """Shell patterns over the qualified names of parameters that are not trained ("embedding.*"). These parameters have
    no gradient and no optimizer state. The engines fsdp and accelerate support this key."""
    parts: dict[str, PartConfig] = Field(default_factory=dict)
    """Parts of the model that a step updates one after another, each with its own loss; see `PartConfig`. The model
    defines the names and the order of its parts. Only the engine fsdp supports this key."""

    @model_validator(mode="after")
    def _parts_are_sections(self) -> OptimizerConfig:
        for name, part in self.parts.items():
            if {"parts", "frozen"} & part.optimizer.keys():
                raise ValueError(
                    f"parts.{name}.optimizer takes neither parts nor frozen: set frozen at the level of parts"
                )
            self.of_part(name)
            if part.schedule is not None:
                SCHEDULES.read(part.schedule)
        return self

    def of_part(self, name: str) -> OptimizerConfig:
        """The complete optimizer section of one part: the part's keys over those that it inherits."""
        given = self.parts[name].optimizer
        own = {key: value for key, value in self.plain().items() if key != "parts"}
        if given.get("name", self.name) != self.name:
            own = {"frozen": own["frozen"]}
        return OPTIMIZERS.read({**own, **given})

    def schedule_of(self, schedule: ScheduleConfig, total_steps: int, to_steps: Callable[[Duration], int]) -> Schedule:
        """Build the schedule of a run; a model with parts has one schedule for each part.

        Args:
            schedule: The run's section `schedule`.
            total_steps, to_steps: See `ScheduleConfig.build`.
        """
        from bigtrain.optim.schedule import PartSchedules

        if not self.parts:
            return schedule.build(self.lr, total_steps, to_steps)
        built = {
            name: chosen.build(self.of_part(name).lr, total_steps, to_steps)
            for name, chosen in self._schedules(schedule).items()
        }
        first = next(iter(built.values()))
        return PartSchedules(first.peak_lr, first.warmup_steps, built)

    def ends_at_duration(self, schedule: ScheduleConfig) -> bool:
        """Whether a longer duration changes the learning rates of earlier steps, in the schedule of any part."""
        return any(one.ends_at_duration for one in self._schedules(schedule).values())

    def _schedules(self, schedule: ScheduleConfig) -> dict[str, ScheduleConfig]:
        own = {
            name: schedule if part.schedule is None else SCHEDULES.read(part.schedule)
            for name, part in self.parts.items()
        }
        return own or {"": schedule}

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the optimizer over parameter groups.

        Args:
            groups: Parameter groups with the keys "params", "lr", "weight_decay", "lr_scale" and "names". The
                optimizer must keep "lr_scale" and "names" in its param_groups.
        """
        raise TypeError(f"{type(self).__name__} does not build its optimizer: define make()")

    def zero_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The optimizer state of one parameter before the first step, under the optimizer's own keys.

        A checkpoint is read into this state, so it must have the keys, shapes and dtypes of the state after a step.
        A step from it must equal the optimizer's own first step. `torch.zeros_like(parameter)` keeps the sharding.
        """
        raise TypeError(f"{type(self).__name__} does not describe its state: define zero_state()")

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of optimizer state of one FP32 parameter of this shape, step counts included."""
        import torch

        state = self.zero_state(torch.empty(shape, dtype=torch.float32, device="meta"))
        return sum(value.numel() * value.element_size() for value in state.values())

    def check_mup(self) -> None:
        """Check that muP's rule of learning rates is valid for this optimizer.

        Raises:
            UserError: The rule is not valid for it.
        """
        if not self.follows_mup:
            known = " or ".join(name for name in OPTIMIZERS if OPTIMIZERS[name].follows_mup)
            raise UserError(
                f"model.mup sets learning rates by the rule of AdamW, but the optimizer '{self.name}' follows another",
                "optimizer.name",
                f"Use {known} (AdamW with weight_decay: 0 is Adam), or remove model.mup.",
            )

    def build(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        all_names: Collection[str] | None = None,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
    ) -> torch.optim.Optimizer:
        """Build the optimizer over the given parameters.

        Each of its param_groups has the keys "lr_scale" and "names"; the names are in the order of "params".

        Args:
            named_parameters: Qualified names and parameters, which are plain tensors or DTensors.
            all_names: Names of the full model's parameters, if `named_parameters` are only some of them.
            lr_scale: The model's factor of the learning rate of a parameter, by qualified name; its weight decay is
                divided by the factor (`ModelConfig.lr_scale`).

        Raises:
            UserError: A pattern of `groups` or `frozen` matches no parameter of the full model, or all parameters are
                frozen.
        """
        from bigtrain.optim.build import build_optimizer

        return build_optimizer(self, named_parameters, all_names, lr_scale)


OPTIMIZERS = Registry("optimizer", OptimizerConfig, package="bigtrain.optim.optimizers", default="adamw")
"""Registry of all optimizers, by `optimizer.name`."""


@dataclass(frozen=True)
class Percentage:
    """A percentage of the run's full duration, such as "20%"."""

    value: float
    """The percentage, from 0 to 100."""

    @classmethod
    def parse(cls, text: str) -> Percentage:
        """Parse "NUMBER%".

        Raises:
            ValueError: The text is not a number with an optional %, or the number is not between 0 and 100.
        """
        try:
            value = float(text.strip().removesuffix("%"))
        except ValueError:
            raise ValueError(f"{text!r} is not a percentage: write for example '20%'") from None
        if not 0 <= value <= 100:
            raise ValueError(f"{text!r} is not between 0% and 100%")
        return cls(value)

    def of(self, steps: int) -> int:
        """This percentage of a number of steps, rounded to full steps."""
        return round(self.value / 100 * steps)

    def __str__(self) -> str:
        return f"{self.value:g}%"


def _parse_portion(value: Any) -> Percentage | Duration:
    if isinstance(value, Percentage):
        return value
    if isinstance(value, str) and value.strip().endswith("%"):
        return Percentage.parse(value)
    return Duration.parse(value)


Portion = Annotated[
    Percentage | Duration,
    PlainValidator(_parse_portion),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "description": 'A part of the duration ("20%"), or "500 steps".'}),
]
"""A length in training: a percentage of the run's full duration ("20%"), or an absolute length ("500 steps")."""


def in_training(value: Duration) -> Duration:
    """Return a duration in steps, tokens or epochs as it is; refuse one in wall-clock time.

    A schedule is a function of the step, so its lengths cannot depend on wall-clock time.

    Raises:
        ValueError: The duration is a wall-clock time.
    """
    if value.is_time:
        raise ValueError(f"'{value}' is a time: give steps, tokens or epochs")
    return value


class ScheduleConfig(Section):
    """Base class of all schedules. A subclass adds its keys and `build`."""

    ends_at_duration: ClassVar[bool] = False
    """Whether a longer duration changes the learning rate of earlier steps: of all steps after the warm-up."""

    name: str
    """Name of the schedule: a file in bigtrain/optim/schedules, or a class of a plugin."""
    warmup: Duration = Field(default=Duration.steps(0))
    """Length of the linear warm-up, in steps, tokens or epochs. Step s of it has the learning rate
    lr * (s + 1) / warmup."""

    @field_validator("warmup")
    @classmethod
    def _is_a_length_of_training(cls, value: Duration) -> Duration:
        return in_training(value)

    def build(self, base_lr: float, total_steps: int, to_steps: Callable[[Duration], int]) -> Schedule:
        """Build the schedule: the learning rate as a function of the step.

        Args:
            base_lr: The optimizer's learning rate, which is the schedule's peak.
            total_steps: The run's duration in steps.
            to_steps: A function that converts a duration of the config to steps.

        Raises:
            UserError: The schedule's warm-up and decay together are longer than the run.
        """
        raise TypeError(f"{type(self).__name__} does not build its schedule: define build()")

    def check_length(self, parts: int, total_steps: int, what: str) -> None:
        """Refuse a schedule whose warm-up and decay are together longer than the run.

        Args:
            parts: Length of the warm-up and decay together, in steps.
            total_steps: The run's duration in steps.
            what: Names of the keys that give these lengths, for the message: "warmup and decay".

        Raises:
            UserError: `parts` is larger than `total_steps`.
        """
        if parts > total_steps:
            raise UserError(
                f"the schedule's {what} takes {parts} steps, but the run has {total_steps}",
                "schedule",
                f"Shorten {what} or lengthen duration.",
            )


SCHEDULES = Registry("schedule", ScheduleConfig, package="bigtrain.optim.schedules", default="constant")
"""Registry of all schedules, by `schedule.name`."""
