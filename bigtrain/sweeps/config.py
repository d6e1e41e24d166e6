"""A sweep's YAML: a base run, the sizes and token counts, the rules that follow from a size, slots, budget, target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import Field, JsonValue, StringConstraints, field_validator, model_validator

from bigtrain.config import BatchSize, Count, Registry, Section

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Positive = Annotated[float, Gt(0)]
Seeds = Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)]
Ratios = Annotated[tuple[Positive, ...], MinLen(1)]
TokenCounts = Annotated[tuple[Annotated[Count, Ge(1)], ...], MinLen(1)]


Target = Annotated[Count, Ge(1000)]


@dataclass(frozen=True)
class SizeFacts:
    """What a rule may follow: one size of the ladder."""

    params: int
    """N, as `ladder.count` counts it."""
    model: Mapping[str, Any]
    """The keys of `model`: layers, width, heads and others."""
    batch_tokens: int
    """Tokens of a batch; 0 for the rule that gives the batch."""


class SweepRule(Section):
    """Base of the rules by which a quantity of a trial follows from its size; a subclass adds its keys and `of`."""

    name: str
    """Which rule: a file of bigtrain/sweeps/rules, or the name of a plugin's class."""

    def of(self, size: SizeFacts) -> float:
        """The quantity for the trials of one size, in the unit of the key that the rule stands under.

        Raises:
            ValueError: The rule gives none for this size, and why.
        """
        raise TypeError(f"{type(self).__name__} gives no quantity: define of()")


RULES = Registry("sweep rule", SweepRule, package="bigtrain.sweeps.rules", default="power", where="ladder")
"""All rules by their names; a rule without a name is a power of N."""

Rule = Annotated[SweepRule, RULES]


def _rule(name: str, **keys: float) -> Any:
    """A field's default; rules are imported when a ladder is read."""
    return Field(default_factory=lambda: RULES.read({"name": name, **keys}))


class LadderConfig(Section):
    """The rules by which shape, batch, learning rate, beta2 and warm-up follow from N.

    Their defaults are those of OLMo's ladder (Bhagia et al. 2024), with its halved learning rate for AdamW.
    """

    count: Literal["without_embeddings", "total"] = "without_embeddings"
    """What N counts, in the rules, in D/N and in the law."""
    batch: Rule = _rule("power", value=2048 * 160, exponent=2 / 3)
    """Tokens of a batch; rounded to full sequences."""
    lr: Rule = _rule("power", value=0.0047 / 2, exponent=-1 / 3)
    """The learning rate at the peak."""
    beta2: Annotated[SweepRule, RULES.with_default("by_batch")] = _rule("by_batch")
    """AdamW's second beta."""
    warmup: Rule = _rule("power", value=1.0, at=1, exponent=1.0)
    """Tokens of warm-up: N of them."""
    keys: dict[Annotated[str, StringConstraints(pattern=r"^[a-z_]+\.[a-z0-9_]+$")], Rule] = Field(default={})
    """Rules of further keys of the base run that take a number: {model.init_std: {name: width, value: 0.02}}."""
    decay: Annotated[float, Gt(0), Lt(1)] = 0.1
    """The last part of every D, in which the learning rate decays; what comes before it is the shared trunk."""
    decay_shape: Literal["linear", "1-sqrt", "cosine"] = "linear"
    """Form of the decay."""
    final_lr: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Learning rate at the end, as a part of the peak."""
    aspect: Positive = 32.0
    """Width over layers that shapes come near to."""
    head_width: Annotated[int, Ge(2)] = 64
    """Width of a head; fewer heads than one are made narrower."""
    width_multiple: Annotated[int, Ge(2)] = 64
    """Widths are multiples of it."""
    mlp_ratio: Positive | None = None
    """Hidden width of the MLP over the model's; null: 4, or 8/3 where it has a gate."""


class SizeConfig(Section):
    """One size of the ladder."""

    params: Target
    """The N to come near to."""
    tokens_per_param: Ratios | None = None
    """D/N of its runs; null: the sweep's."""
    tokens: TokenCounts | None = None
    """D of its runs, in place of D/N."""
    seeds: Seeds | None = None
    """A trunk each; null: the sweep's."""
    model: dict[str, JsonValue] | None = None
    """Keys of `model` that give its shape, in place of the ladder's; `params` is then its name alone."""
    lr: Positive | None = None
    """Learning rate, in place of the ladder's."""
    batch: BatchSize | None = None
    """Batch, in place of the ladder's."""

    @model_validator(mode="after")
    def _one_kind_of_length(self) -> SizeConfig:
        if self.tokens is not None and self.tokens_per_param is not None:
            raise ValueError("tokens and tokens_per_param both say how long its runs are: give one")
        return self


class LearningRates(Section):
    """A sweep of the learning rate before the grid: the best of each size is taken, one at the edge is refused."""

    factors: Annotated[tuple[Positive, ...], MinLen(3)] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Of the ladder's learning rate."""
    tokens_per_param: Positive = 20.0
    """D/N of these runs."""


class SlotsConfig(Section):
    """How many trials run side by side, and on what."""

    on: Literal["machine", "ray"] = "machine"
    """This machine, or the Ray cluster on one of whose nodes the sweep is started (or which RAY_ADDRESS names)."""
    count: Annotated[int, Ge(1)] | Literal["auto"] = "auto"
    """Trials at once; auto: one a GPU, else one for each `procs * threads` cores; on Ray as many as its nodes hold."""
    procs: Annotated[int, Ge(1)] = 1
    """Processes (ranks) of a trial; on Ray on each of its `base.job.nodes` nodes."""
    threads: Annotated[int, Ge(1)] = 1
    """Threads of each process on a CPU."""
    max_failures: Annotated[int, Ge(0)] = 3
    """Times that a trial is started again after a crash without a new checkpoint between."""


class TargetConfig(Section):
    """What the law is wanted for."""

    flops: Positive
    """The budget of the run to come, in FLOPs."""


class BudgetConfig(Section):
    """What the sweep may cost; a plan above it is refused, `sizes: auto` fills it."""

    flops: Positive | None = None
    """FLOPs of all trials together."""
    hours: Positive | None = None
    """Hours from the first trial to the last."""
    usd: Positive | None = None
    """Money, by `hardware`'s price."""

    @model_validator(mode="after")
    def _limits_something(self) -> BudgetConfig:
        if self.flops is None and self.hours is None and self.usd is None:
            raise ValueError("a budget needs flops, hours or usd")
        return self


class HardwareConfig(Section):
    """What the trials will run on, where that is not this machine: the planner's times, and money from time."""

    device: str | None = None
    """What `bigtrain plan --hardware` takes: an entry (h100), a device ("H100 SXM") or a YAML file; null: this
    machine."""
    mfu: Annotated[float, Gt(0), Le(1)] | None = None
    """Share of the device's peak that the trials reach, in place of the planner's times. Where neither it nor another
    machine's device is given, tokens a second are measured here."""
    usd_per_hour: Positive | None = None
    """Price of one device for an hour; null: that of the entry, where it has one."""
    start_s: Annotated[float, Ge(0)] = 60.0
    """Seconds from the start of a trial to its first step, where they are not measured."""


class ExpectedConfig(Section):
    """The law and the noise that a plan simulates: how wide an interval comes out depends on them.

    The defaults are Chinchilla's law as refitted by Besiroglu et al. 2024, which small models with a small vocabulary
    do not follow: where an earlier law is known, give its numbers.
    """

    A: Positive = 482.0
    """Of A / N^alpha."""
    B: Positive = 2085.0
    """Of B / D^beta."""
    E: Positive = 1.82
    """The loss that no size goes below."""
    alpha: Positive = 0.348
    """Of A / N^alpha."""
    beta: Positive = 0.366
    """Of B / D^beta."""
    trunk_noise: Annotated[float, Ge(0)] = 0.002
    """Relative deviation that all branches of a trunk share."""
    noise: Annotated[float, Ge(0)] = 0.001
    """Relative deviation of each run's own."""


class SweepConfig(Section):
    """A sweep: what is trained, at which sizes and lengths, by which rules, on what."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    """Name of the sweep: its directory, and its group in the tracker."""

    base: dict[str, JsonValue]
    """A run as `bigtrain train` takes it, without what the sweep sets: name, seed, the model's shape, batch, duration,
    learning rate, betas, schedule, init."""

    sizes: Literal["auto"] | Annotated[tuple[Target | SizeConfig, ...], MinLen(1)]
    """The ladder: target Ns, or mappings that say more; auto: chosen to fill the budget."""

    tokens_per_param: Ratios = (5.0, 10.0, 20.0, 40.0)
    """D/N of each size's runs."""

    seeds: Seeds = (1337,)
    """A trunk with all its branches each."""

    learning_rates: LearningRates | None = None
    """A sweep of the learning rate at each size, before its trunk."""

    ladder: LadderConfig = Field(default_factory=LadderConfig)
    """The rules that follow from N."""

    target: TargetConfig | None = None
    """What the law is wanted for; null: ten times the largest run."""

    budget: BudgetConfig | None = None
    """What the sweep may cost."""

    slots: SlotsConfig = SlotsConfig()
    """How many trials run side by side."""

    hardware: HardwareConfig = HardwareConfig()
    """What they run on."""

    expected: ExpectedConfig = Field(default=ExpectedConfig())
    """What a plan takes the law and the noise to be."""

    @field_validator("sizes")
    @classmethod
    def _each_once(cls, value: Any) -> Any:
        if value != "auto":
            targets = [size.params if isinstance(size, SizeConfig) else size for size in value]
            twice = next((target for target in targets if targets.count(target) > 1), None)
            if twice is not None:
                raise ValueError(f"the size {twice} stands twice: join the two")
        return value

    @model_validator(mode="after")
    def _a_choice_needs_a_budget(self) -> SweepConfig:
        if self.sizes == "auto" and (self.budget is None or self.budget.flops is None):
            raise ValueError("sizes: auto fills a budget: give budget: {flops: ...}")
        return self

    def ladder_sizes(self) -> list[SizeConfig]:
        """The sizes as mappings, the largest first: its trunk is what the sweep waits for. Empty where auto."""
        if isinstance(self.sizes, str):
            return []
        found = [size if isinstance(size, SizeConfig) else SizeConfig(params=size) for size in self.sizes]
        return sorted(found, key=lambda size: -size.params)
