"""The sections `optimizer` and `schedule` of a run's YAML."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import (
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from bigtrain.config import Duration, Section, UserError

if TYPE_CHECKING:
    import torch

    from bigtrain.optim.schedule import Schedule

Fraction = Annotated[float, Ge(0), Lt(1)]
NonNegative = Annotated[float, Ge(0)]


class ParameterGroup(Section):
    """Other settings for the parameters whose qualified names match a pattern."""

    pattern: str
    """A shell pattern over the whole qualified name ("embedding.*", "*.bias"); the first match counts."""
    lr_scale: NonNegative = 1.0
    """Factor of the schedule's learning rate."""
    weight_decay: NonNegative | None = None
    """Weight decay, whatever the parameter's shape; null: the optimizer's, for matrices alone."""


class _Optimizer(Section):
    """What all optimizers share."""

    lr: Annotated[float, Gt(0)] = 1e-3
    """Learning rate at the schedule's peak."""
    weight_decay: NonNegative = 0.0
    """For parameters of two and more dimensions, unless a group says otherwise."""
    clip: Annotated[float, Gt(0)] | None = 1.0
    """Largest global norm of the gradient, enforced by the engine; null: no limit."""
    groups: tuple[ParameterGroup, ...] = ()
    """Exceptions by pattern."""
    frozen: tuple[str, ...] = ()
    """Shell patterns over qualified names ("embedding.*"): parameters that stay as they are, to the bit, without a
    gradient or optimizer state; on the engine fsdp."""

    def build(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], all_names: Collection[str] | None = None
    ) -> torch.optim.Optimizer:
        """The optimizer over the given parameters, plain or DTensors.

        Each of its param_groups carries "lr_scale", and "names" in the order of "params".

        Args:
            all_names: Of the whole model's parameters, where those given are a part of them.

        Raises:
            UserError: A group's pattern, or a frozen one, matches no parameter of the whole model; or nothing is left.
        """
        from bigtrain.optim.build import build_optimizer

        return build_optimizer(self, named_parameters, all_names)


class _AdamFamily(_Optimizer):
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment."""


class AdamWConfig(_AdamFamily):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    weight_decay: NonNegative = 0.1


class AdamConfig(_AdamFamily):
    """Adam (Kingma and Ba 2015); its weight decay is added to the gradient."""

    name: Literal["adam"] = "adam"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)


class SGDConfig(_Optimizer):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    momentum: Fraction = 0.0
    """Decay rate of the velocity; 0: none."""
    nesterov: bool = False
    """Nesterov's form; needs momentum."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum greater than 0")
        return self


class RMSpropConfig(_Optimizer):
    """RMSprop (Tieleman and Hinton 2012)."""

    name: Literal["rmsprop"] = "rmsprop"
    alpha: Fraction = 0.99
    """Decay rate of the second moment."""
    momentum: Fraction = 0.0
    """Decay rate of the velocity; 0: none."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment."""


def _name_or(default: str) -> Callable[[Any], str]:
    """The union's tag: the key `name`, which may be left out for the default."""

    def tag(value: Any) -> str:
        return str(value.get("name", default) if isinstance(value, dict) else getattr(value, "name", default))

    return tag


OptimizerConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[AdamConfig, Tag("adam")]
    | Annotated[SGDConfig, Tag("sgd")]
    | Annotated[RMSpropConfig, Tag("rmsprop")],
    Discriminator(_name_or("adamw")),
]
"""The section `optimizer`: chosen by `name`, adamw where it is left out."""


@dataclass(frozen=True)
class Percentage:
    """A part of the whole duration: "20%"."""

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
"""A part of the whole duration ("20%"), or a length of its own ("500 steps")."""


def _in_training(value: Duration) -> Duration:
    if value.is_time:
        raise ValueError(f"'{value}' is a time: give steps, tokens or epochs")
    return value


class _Schedule(Section):
    """What all schedules share."""

    ends_at_duration: ClassVar[bool] = False
    """Whether a longer duration changes steps that are already done, from the first one after the warm-up."""

    warmup: Duration = Field(default=Duration.steps(0))
    """Linear rise at the start: step s has lr * (s + 1) / warmup."""

    @field_validator("warmup")
    @classmethod
    def _is_a_length_of_training(cls, value: Duration) -> Duration:
        return _in_training(value)

    def build(self, base_lr: float, total_steps: int, to_steps: Callable[[Duration], int]) -> Schedule:
        """The schedule as arithmetic.

        Args:
            base_lr: The optimizer's learning rate: the peak.
            total_steps: The run's duration in steps.
            to_steps: Converts a duration of the config to steps.

        Raises:
            UserError: Its parts are longer than the run.
        """
        raise TypeError(f"{type(self).__name__} does not say how to build its schedule: define build()")

    def _fit(self, parts: int, total_steps: int, what: str) -> None:
        if parts > total_steps:
            raise UserError(
                f"the schedule's {what} takes {parts} steps and the run has {total_steps}",
                "schedule",
                f"shorten {what} or lengthen duration",
            )


class ConstantConfig(_Schedule):
    """Warm-up, then the same learning rate for ever."""

    name: Literal["constant"] = "constant"

    def build(self, base_lr: float, total_steps: int, to_steps: Callable[[Duration], int]) -> Schedule:
        """A `schedule.Constant`."""
        from bigtrain.optim.schedule import Constant

        return Constant(base_lr, to_steps(self.warmup))


class CosineConfig(_Schedule):
    """Warm-up, then half a cosine down to `final_lr` at the end of the run."""

    ends_at_duration: ClassVar[bool] = True

    name: Literal["cosine"] = "cosine"
    final_lr: NonNegative = 0.0
    """Learning rate at the end of the run."""

    def build(self, base_lr: float, total_steps: int, to_steps: Callable[[Duration], int]) -> Schedule:
        """A `schedule.Cosine`."""
        from bigtrain.optim.schedule import Cosine

        warmup = to_steps(self.warmup)
        self._fit(warmup, total_steps, "warmup")
        return Cosine(base_lr, warmup, total_steps, self.final_lr)


class WSDConfig(_Schedule):
    """Warm-up, stable, decay: the run may be lengthened until its decay begins."""

    name: Literal["wsd"] = "wsd"
    final_lr: NonNegative = 0.0
    """Learning rate at the end of the run."""
    decay: Portion = Percentage(20.0)
    """The last part of the run, in which the rate decays: a percentage of the whole, or a duration."""
    shape: Literal["linear", "1-sqrt", "cosine"] = "1-sqrt"
    """Form of the decay."""

    @field_validator("decay")
    @classmethod
    def _decays_over_training(cls, value: Percentage | Duration) -> Percentage | Duration:
        return _in_training(value) if isinstance(value, Duration) else value

    def build(self, base_lr: float, total_steps: int, to_steps: Callable[[Duration], int]) -> Schedule:
        """A `schedule.WarmupStableDecay`."""
        from bigtrain.optim.schedule import WarmupStableDecay

        warmup = to_steps(self.warmup)
        decay = self.decay.of(total_steps) if isinstance(self.decay, Percentage) else to_steps(self.decay)
        self._fit(warmup + decay, total_steps, "warmup and decay")
        return WarmupStableDecay(base_lr, warmup, total_steps, decay, self.final_lr, self.shape)


ScheduleConfig = Annotated[
    Annotated[ConstantConfig, Tag("constant")]
    | Annotated[CosineConfig, Tag("cosine")]
    | Annotated[WSDConfig, Tag("wsd")],
    Discriminator(_name_or("constant")),
]
"""The section `schedule`: chosen by `name`, constant where it is left out."""
