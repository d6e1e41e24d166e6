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

if TYPE_CHECKING:
    import torch

    from bigtrain.optim.schedule import Schedule

Fraction = Annotated[float, Ge(0), Lt(1)]
NonNegative = Annotated[float, Ge(0)]


class ParameterGroup(Section):
    """Other settings for the parameters whose qualified names match a pattern."""

    pattern: str
    """A shell pattern over the full qualified name ("embedding.*", "*.bias"); the first group that matches applies."""
    lr_scale: NonNegative = 1.0
    """Factor on the schedule's learning rate."""
    weight_decay: NonNegative | None = None
    """Weight decay, for parameters of any shape; null: the optimizer's, for matrices only."""


class PartConfig(Section):
    """One part of a model that is updated by itself, such as the generator of a GAN."""

    parameters: tuple[str, ...] = ()
    """Shell patterns over qualified names; none: the names that begin with the part's own and a dot."""
    optimizer: dict[str, Any] = Field(default_factory=dict)
    """Keys that differ from the section around it: {lr: 4e-4}. With another `name` nothing is taken over."""
    schedule: dict[str, Any] | None = None
    """As the run's section `schedule`; null: the run's own."""
    every: Annotated[int, Ge(1)] = 1
    """It is updated once in so many steps, in the last of them."""


class OptimizerConfig(Section):
    """Base of all optimizers; a subclass adds its keys, `make` and `zero_state`.

    An optimizer must update each parameter from its own gradient and state by tensor operations. Then fsdp shards it
    without extra code: parameters, gradients and state are DTensors there.
    """

    elementwise: ClassVar[bool] = True
    """Whether each element's update depends only on that element's gradient and state. The engine deepspeed, which
    flattens parameters, supports only such optimizers."""
    follows_mup: ClassVar[bool] = False
    """Whether muP's learning rates (`model.mup`) are meant for it: the size of its updates does not depend on that of
    the gradient, and weight decay is apart from the gradient."""

    name: str
    """Which optimizer: a file of bigtrain/optim/optimizers, or the name of a plugin's class."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Learning rate at the schedule's peak."""
    weight_decay: NonNegative = 0.0
    """For parameters of two and more dimensions, unless a group sets another."""
    clip: Annotated[float, Gt(0)] | None = 1.0
    """Largest global norm of the gradient, enforced by the engine; null: no limit."""
    groups: tuple[ParameterGroup, ...] = ()
    """Settings for parameters by pattern; see `ParameterGroup`."""
    frozen: tuple[str, ...] = ()
    """Shell patterns over qualified names ("embedding.*"): parameters that are not trained. They have no gradient and
    no optimizer state. Supported by the engine fsdp."""
    parts: dict[str, PartConfig] = Field(default_factory=dict)
    """Parts of the model that are updated one after another in a step, each by its own loss; see `PartConfig`. A model
    names its parts and their order. Supported by the engine fsdp."""

    @model_validator(mode="after")
    def _parts_are_sections(self) -> OptimizerConfig:
        for name, part in self.parts.items():
            if {"parts", "frozen"} & part.optimizer.keys():
                raise ValueError(f"parts.{name}.optimizer takes neither parts nor frozen: set frozen beside parts")
            self.of_part(name)
            if part.schedule is not None:
                SCHEDULES.read(part.schedule)
        return self

    def of_part(self, name: str) -> OptimizerConfig:
        """The optimizer of a part, as a section of its own."""
        given = self.parts[name].optimizer
        own = {key: value for key, value in self.plain().items() if key != "parts"}
        if given.get("name", self.name) != self.name:
            own = {"frozen": own["frozen"]}
        return OPTIMIZERS.read({**own, **given})

    def schedule_of(self, schedule: ScheduleConfig, total_steps: int, to_steps: Callable[[Duration], int]) -> Schedule:
        """The learning rates of a run: of each part by its own schedule, where there are parts.

        Args:
            schedule: The run's section.
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
        """Whether a longer duration changes the learning rates of earlier steps."""
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
            groups: Each has "params", "lr", "weight_decay", "lr_scale" and "names". The optimizer must keep the last
                two.
        """
        raise TypeError(f"{type(self).__name__} does not build its optimizer: define make()")

    def zero_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of one parameter before the first step, by the optimizer's own keys.

        A checkpoint is read into it, so it must have the keys, shapes and dtypes of the state after a step. A
        step from it must equal the optimizer's own first step. `torch.zeros_like(parameter)` keeps the sharding.
        """
        raise TypeError(f"{type(self).__name__} does not describe its state: define zero_state()")

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of optimizer state of one FP32 parameter of this shape, with step counts."""
        import torch

        state = self.zero_state(torch.empty(shape, dtype=torch.float32, device="meta"))
        return sum(value.numel() * value.element_size() for value in state.values())

    def check_mup(self) -> None:
        """Refuse an optimizer for which muP has other learning rates.

        Raises:
            UserError: It is one.
        """
        if not self.follows_mup:
            known = " or ".join(name for name in OPTIMIZERS if OPTIMIZERS[name].follows_mup)
            raise UserError(
                f"model.mup sets learning rates by the rule of AdamW, and the optimizer '{self.name}' follows another",
                "optimizer.name",
                f"Use {known} (AdamW with weight_decay: 0 is Adam), or remove model.mup.",
            )

    def build(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        all_names: Collection[str] | None = None,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
    ) -> torch.optim.Optimizer:
        """Build the optimizer over the given parameters, plain tensors or DTensors.

        Each of its param_groups carries "lr_scale", and "names" in the order of "params".

        Args:
            all_names: Names of the full model's parameters, if `named_parameters` are only some of them.
            lr_scale: The model's own factor on the learning rate of each parameter; weight decay is divided by it
                (`ModelConfig.lr_scale`).

        Raises:
            UserError: A pattern of a group or of `frozen` matches no parameter of the full model, or all are frozen.
        """
        from bigtrain.optim.build import build_optimizer

        return build_optimizer(self, named_parameters, all_names, lr_scale)


OPTIMIZERS = Registry("optimizer", OptimizerConfig, package="bigtrain.optim.optimizers", default="adamw")
"""All optimizers by `optimizer.name`."""


@dataclass(frozen=True)
class Percentage:
    """A share of the full duration: "20%"."""

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
        """This share of a number of steps, rounded."""
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
"""A share of the full duration ("20%"), or an absolute length ("500 steps")."""


def in_training(value: Duration) -> Duration:
    """Refuse a duration that is a time: a schedule is a function of the step.

    Raises:
        ValueError: The duration is a time.
    """
    if value.is_time:
        raise ValueError(f"'{value}' is a time: give steps, tokens or epochs")
    return value


class ScheduleConfig(Section):
    """Base of all schedules; a subclass adds its keys and `build`."""

    ends_at_duration: ClassVar[bool] = False
    """Whether a longer duration changes the learning rate of earlier steps, from the first one after the warm-up."""

    name: str
    """Which schedule: a file of bigtrain/optim/schedules, or the name of a plugin's class."""
    warmup: Duration = Field(default=Duration.steps(0))
    """Length of the linear warm-up: step s has lr * (s + 1) / warmup."""

    @field_validator("warmup")
    @classmethod
    def _is_a_length_of_training(cls, value: Duration) -> Duration:
        return in_training(value)

    def build(self, base_lr: float, total_steps: int, to_steps: Callable[[Duration], int]) -> Schedule:
        """The learning rate as a function of the step.

        Args:
            base_lr: The optimizer's learning rate, which is the peak.
            total_steps: The run's duration in steps.
            to_steps: Converts a duration of the config to steps.

        Raises:
            UserError: The schedule's parts are longer than the run.
        """
        raise TypeError(f"{type(self).__name__} does not build its schedule: define build()")

    def check_length(self, parts: int, total_steps: int, what: str) -> None:
        """Refuse a schedule whose parts are longer than the run.

        Args:
            parts: Steps of `what`.
            what: The keys, for the message: "warmup and decay".

        Raises:
            UserError: They are longer.
        """
        if parts > total_steps:
            raise UserError(
                f"the schedule's {what} takes {parts} steps and the run has {total_steps}",
                "schedule",
                f"shorten {what} or lengthen duration",
            )


SCHEDULES = Registry("schedule", ScheduleConfig, package="bigtrain.optim.schedules", default="constant")
"""All schedules by `schedule.name`."""
