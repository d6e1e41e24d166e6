"""The sections `optimizer` and `schedule` of a run's YAML, as all optimizers and all schedules share them.

An optimizer is one file in optimizers/, a schedule one file in schedules/; a user's own come with `--plugin`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, field_validator

from bigtrain.config import Duration, Registry, Section, UserError

if TYPE_CHECKING:
    import torch

    from bigtrain.optim.schedule import Schedule

Fraction = Annotated[float, Ge(0), Lt(1)]
NonNegative = Annotated[float, Ge(0)]


class ParameterGroup(Section):
    """Other settings for the parameters whose qualified names match a pattern."""

    pattern: str
    """A shell pattern over the full qualified name ("embedding.*", "*.bias"); the first match counts."""
    lr_scale: NonNegative = 1.0
    """Factor of the schedule's learning rate."""
    weight_decay: NonNegative | None = None
    """Weight decay, whatever the parameter's shape; null: the optimizer's, for matrices alone."""


class OptimizerConfig(Section):
    """What all optimizers share; an optimizer adds its keys, `make` and `zero_state`.

    An optimizer must update each parameter from its own gradient and state by tensor operations. Then fsdp shards it
    without a line of code: parameters, gradients and state are DTensors there.
    """

    elementwise: ClassVar[bool] = True
    """Whether each element's update depends on that element's gradient and state alone. The engine deepspeed, which
    lays parameters end to end, takes no other optimizer."""

    name: str
    """Which optimizer: a file of bigtrain/optim/optimizers, or the name of a plugin's class."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Learning rate at the schedule's peak."""
    weight_decay: NonNegative = 0.0
    """For parameters of two and more dimensions, unless a group sets another."""
    clip: Annotated[float, Gt(0)] | None = 1.0
    """Largest global norm of the gradient, enforced by the engine; null: no limit."""
    groups: tuple[ParameterGroup, ...] = ()
    """Exceptions by pattern."""
    frozen: tuple[str, ...] = ()
    """Shell patterns over qualified names ("embedding.*"): parameters that stay as they are, to the bit, without a
    gradient or optimizer state; on the engine fsdp."""

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups.

        Args:
            groups: Each with "params", "lr", "weight_decay", and "lr_scale" and "names", which it must keep.
        """
        raise TypeError(f"{type(self).__name__} does not build its optimizer: define make()")

    def zero_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of one parameter before the first step, by the optimizer's own keys.

        A checkpoint is read into it, so it must have the keys, shapes and dtypes that a step leaves. A step from it
        must equal the optimizer's own first step. `torch.zeros_like(parameter)` keeps the sharding of a DTensor.
        """
        raise TypeError(f"{type(self).__name__} does not describe its state: define zero_state()")

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the state of one FP32 parameter of a shape, step counts included."""
        import torch

        state = self.zero_state(torch.empty(shape, dtype=torch.float32, device="meta"))
        return sum(value.numel() * value.element_size() for value in state.values())

    def build(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], all_names: Collection[str] | None = None
    ) -> torch.optim.Optimizer:
        """The optimizer over the given parameters, plain or DTensors.

        Each of its param_groups carries "lr_scale", and "names" in the order of "params".

        Args:
            all_names: Of the full model's parameters, if those given are a part of them.

        Raises:
            UserError: A group's pattern, or a frozen one, matches no parameter of the full model; or nothing is left.
        """
        from bigtrain.optim.build import build_optimizer

        return build_optimizer(self, named_parameters, all_names)


OPTIMIZERS = Registry("optimizer", OptimizerConfig, package="bigtrain.optim.optimizers", default="adamw")
"""All optimizers by `optimizer.name`."""


@dataclass(frozen=True)
class Percentage:
    """A part of the full duration: "20%"."""

    value: float

    @classmethod
    def parse(cls, text: str) -> Percentage:
        """Parse "NUMBER%", from 0% to 100%."""
        try:
            value = float(text.strip().removesuffix("%"))
        except ValueError:
            raise ValueError(f"{text!r} is not a percentage: write for example '20%'") from None
        if not 0 <= value <= 100:
            raise ValueError(f"{text!r} is not between 0% and 100%")
        return cls(value)

    def of(self, steps: int) -> int:
        """This part of a number of steps, rounded."""
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
"""A part of the full duration ("20%"), or a length of its own ("500 steps")."""


def in_training(value: Duration) -> Duration:
    """Refuse a duration that is a time: a schedule is a function of the step.

    Raises:
        ValueError: It is one.
    """
    if value.is_time:
        raise ValueError(f"'{value}' is a time: give steps, tokens or epochs")
    return value


class ScheduleConfig(Section):
    """What all schedules share; a schedule adds its keys and `build`."""

    ends_at_duration: ClassVar[bool] = False
    """Whether a longer duration changes steps that are already done, from the first one after the warm-up."""

    name: str
    """Which schedule: a file of bigtrain/optim/schedules, or the name of a plugin's class."""
    warmup: Duration = Field(default=Duration.steps(0))
    """Linear rise at the start: step s has lr * (s + 1) / warmup."""

    @field_validator("warmup")
    @classmethod
    def _is_a_length_of_training(cls, value: Duration) -> Duration:
        return in_training(value)

    def build(self, base_lr: float, total_steps: int, to_steps: Callable[[Duration], int]) -> Schedule:
        """The learning rate as a function of the step.

        Args:
            base_lr: The optimizer's learning rate: the peak.
            total_steps: The run's duration in steps.
            to_steps: Converts a duration of the config to steps.

        Raises:
            UserError: Its parts are longer than the run.
        """
        raise TypeError(f"{type(self).__name__} does not build its schedule: define build()")

    def check_length(self, parts: int, total_steps: int, what: str) -> None:
        """Refuse a schedule whose parts are longer than the run.

        Args:
            parts: Steps of `what`.
            what: The keys, for the message: "warmup and decay".

        Raises:
            UserError: They are.
        """
        if parts > total_steps:
            raise UserError(
                f"the schedule's {what} takes {parts} steps and the run has {total_steps}",
                "schedule",
                f"shorten {what} or lengthen duration",
            )


SCHEDULES = Registry("schedule", ScheduleConfig, package="bigtrain.optim.schedules", default="constant")
"""All schedules by `schedule.name`."""
