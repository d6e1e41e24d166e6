"""The sections of a sweep's YAML: a base run, sizes and token counts, the ladder's rules, slots, budget and target."""

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
    """The properties of one size of the ladder that a rule may use."""

    params: int
    """N, as `ladder.count` counts it."""
    model: Mapping[str, Any]
    """The keys of `model` that give the shape: layers, width, heads and others."""
    batch_tokens: int
    """Tokens of a global batch; 0 for the rule that gives the batch."""


class SweepRule(Section):
    """Base class of the rules, each of which computes a quantity of a trial from its size.

    A subclass adds its keys and `of`.
    """

    name: str
    """Name of the rule: a file in bigtrain/sweeps/rules, or a class of a plugin."""

    def of(self, size: SizeFacts) -> float:
        """The quantity for the trials of one size, in the unit of the key to which the rule is assigned.

        Raises:
            ValueError: The rule gives no quantity for this size; the text says why.
        """
        raise TypeError(f"{type(self).__name__} does not compute its quantity: define of()")


RULES = Registry("sweep rule", SweepRule, package="bigtrain.sweeps.rules", default="power", where="ladder")
"""Registry of all rules, by name; a rule without a name is a power of N."""

Rule = Annotated[SweepRule, RULES]


def _rule(name: str, **keys: float) -> Any:
    """A field with a rule as its default. The rule's file is imported only when a ladder is read."""
    return Field(default_factory=lambda: RULES.read({"name": name, **keys}))


class LadderConfig(Section):
    """The rules that compute shape, batch, learning rate, beta2 and warm-up from N.

    The defaults are those of OLMo's ladder (Bhagia et al. 2024), with its halved learning rate for AdamW.
    """

    count: Literal["without_embeddings", "total"] = "without_embeddings"
    """Which parameters N counts, in the rules, in D/N and in the law."""
    batch: Rule = _rule("power", value=2048 * 160, exponent=2 / 3)
    """Rule of the global batch, in tokens; the result is rounded to full sequences."""
    lr: Rule = _rule("power", value=0.0047 / 2, exponent=-1 / 3)
    """Rule of the learning rate at the peak."""
    beta2: Annotated[SweepRule, RULES.with_default("by_batch")] = _rule("by_batch")
    """Rule of AdamW's second beta."""
    warmup: Rule = _rule("power", value=1.0, at=1, exponent=1.0)
    """Rule of the warm-up, in tokens; by default N tokens."""
    keys: dict[Annotated[str, StringConstraints(pattern=r"^[a-z_]+\.[a-z0-9_]+$")], Rule] = Field(default={})
    """Rules of other numeric keys of the base run: {model.init_std: {name: width, value: 0.02}}."""
    decay: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Fraction of each run's steps, at its end, in which the learning rate decays. The steps before are the shared
    trunk."""
    decay_shape: Literal["linear", "1-sqrt", "cosine"] = "linear"
    """Form of the decay."""
    final_lr: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Learning rate at the end of the decay, as a fraction of the peak."""
    aspect: Positive = 32.0
    """Wanted ratio of width to layers."""
    head_width: Annotated[int, Ge(2)] = 64
    """Wanted width of an attention head; a model narrower than this has a single head."""
    width_multiple: Annotated[int, Ge(2)] = 64
    """Every width is a multiple of this number."""
    mlp_ratio: Positive | None = None
    """Ratio of the MLP's hidden width to the model's width; null: 4, or 8/3 if the MLP has a gate."""


class SizeConfig(Section):
    """One size of the ladder."""

    params: Target
    """Target N: the ladder chooses a shape with about so many parameters."""
    tokens_per_param: Ratios | None = None
    """D/N of the size's runs; null: the sweep's `tokens_per_param`."""
    tokens: TokenCounts | None = None
    """D of the size's runs in tokens, in place of D/N."""
    seeds: Seeds | None = None
    """Seeds of the size's trunks, one trunk each; null: the sweep's `seeds`."""
    model: dict[str, JsonValue] | None = None
    """Keys of `model` that give the shape, in place of the ladder's shape. `params` is then only the size's name."""
    lr: Positive | None = None
    """Learning rate, in place of the ladder's rule."""
    batch: BatchSize | None = None
    """Global batch, in place of the ladder's rule."""

    @model_validator(mode="after")
    def _one_kind_of_length(self) -> SizeConfig:
        if self.tokens is not None and self.tokens_per_param is not None:
            raise ValueError("tokens and tokens_per_param both set the length of its runs: give one")
        return self


class LearningRates(Section):
    """A sweep of the learning rate before the grid.

    Each size takes the learning rate with the lowest held-out loss. If that is the smallest or the largest one tried,
    the size gets no grid.
    """

    factors: Annotated[tuple[Positive, ...], MinLen(3)] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Learning rates to try, as multiples of the ladder's learning rate."""
    tokens_per_param: Positive = 20.0
    """D/N of the runs that try a learning rate."""


class SlotsConfig(Section):
    """How many trials run at the same time, and on which machines."""

    on: Literal["machine", "ray"] = "machine"
    """machine: this machine. ray: the Ray cluster that this node belongs to or RAY_ADDRESS names."""
    count: Annotated[int, Ge(1)] | Literal["auto"] = "auto"
    """Number of trials that run at the same time. auto: one per `procs` GPUs, without GPUs one per `procs * threads`
    cores; on Ray as many as the cluster's nodes can hold."""
    procs: Annotated[int, Ge(1)] = 1
    """Ranks of a trial; on Ray, ranks on each of its `base.job.nodes` nodes."""
    threads: Annotated[int, Ge(1)] = 1
    """CPU threads of each rank."""
    max_failures: Annotated[int, Ge(0)] = 3
    """Maximum number of restarts of a trial after crashes without a new checkpoint between them."""


class TargetConfig(Section):
    """The large run that the law shall predict."""

    flops: Positive
    """Compute of that run, in FLOPs."""


class BudgetConfig(Section):
    """The limits on the sweep's cost. A plan above a limit is refused; `sizes: auto` uses up the FLOPs."""

    flops: Positive | None = None
    """FLOPs of all trials together."""
    hours: Positive | None = None
    """Hours from the start of the first trial to the end of the last."""
    usd: Positive | None = None
    """Cost of all trials in US dollars, by the price of `hardware`."""

    @model_validator(mode="after")
    def _limits_something(self) -> BudgetConfig:
        if self.flops is None and self.hours is None and self.usd is None:
            raise ValueError("a budget needs flops, hours or usd")
        return self


class HardwareConfig(Section):
    """The hardware of the trials, from which a plan computes time and money."""

    device: str | None = None
    """Hardware as in `bigtrain plan --hardware`: an entry (h100), a device ("H100 SXM") or a YAML file; null: this
    machine."""
    mfu: Annotated[float, Gt(0), Le(1)] | None = None
    """Fraction of the device's peak FLOPs that the trials reach, in place of the planner's estimate. If this is null
    and `device` is null or this machine, tokens per second are measured here."""
    usd_per_hour: Positive | None = None
    """Price of one device in US dollars per hour; null: the price of the hardware's entry, if it has one."""
    start_s: Annotated[float, Ge(0)] = 60.0
    """Seconds from the start of a trial to its first step, if they are not measured."""


class ExpectedConfig(Section):
    """The law, loss = E + A / N^alpha + B / D^beta, and the noise from which a plan simulates sweeps.

    The width of the expected interval depends on both. The defaults are Chinchilla's law as refitted by Besiroglu et
    al. 2024. Small models with a small vocabulary do not follow it; set the values of an earlier law if there is one.
    """

    A: Positive = 482.0
    """Coefficient A of the term A / N^alpha."""
    B: Positive = 2085.0
    """Coefficient B of the term B / D^beta."""
    E: Positive = 1.82
    """Irreducible loss, in nats per token."""
    alpha: Positive = 0.348
    """Exponent of N in the term A / N^alpha."""
    beta: Positive = 0.366
    """Exponent of D in the term B / D^beta."""
    trunk_noise: Annotated[float, Ge(0)] = 0.002
    """Relative standard deviation of the loss that all branches of a trunk share."""
    noise: Annotated[float, Ge(0)] = 0.001
    """Relative standard deviation of the loss of each single run."""


class SweepConfig(Section):
    """A sweep: the base run, the sizes and lengths of its trials, the rules of the ladder, and where trials run."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    """Name of the sweep: the name of its directory, and of its group in the tracker."""

    base: dict[str, JsonValue]
    """The config of a run as for `bigtrain train`, without the keys that the sweep sets: name, seed, the model's shape,
    batch, duration, learning rate, betas, schedule, init."""

    sizes: Literal["auto"] | Annotated[tuple[Target | SizeConfig, ...], MinLen(1)]
    """The ladder's sizes, each a target N or a mapping with further keys; auto: sizes that use up the budget."""

    tokens_per_param: Ratios = (5.0, 10.0, 20.0, 40.0)
    """D/N of each size's runs."""

    seeds: Seeds = (1337,)
    """Seeds of the trunks. Each size has one trunk with all its branches for each seed."""

    learning_rates: LearningRates | None = None
    """A sweep of the learning rate at each size, before its trunks; null: the ladder's rule gives it."""

    ladder: LadderConfig = Field(default_factory=LadderConfig)
    """The rules that compute shape and hyperparameters from N."""

    target: TargetConfig | None = None
    """The large run that the law shall predict; null: one with ten times the FLOPs of the sweep's largest run."""

    budget: BudgetConfig | None = None
    """The limits on the sweep's cost; null: no limits."""

    slots: SlotsConfig = SlotsConfig()
    """How many trials run at the same time, and on which machines."""

    hardware: HardwareConfig = HardwareConfig()
    """The hardware of the trials, for a plan's time and money."""

    expected: ExpectedConfig = Field(default=ExpectedConfig())
    """The law and the noise that a plan assumes."""

    @field_validator("sizes")
    @classmethod
    def _each_once(cls, value: Any) -> Any:
        if value != "auto":
            targets = [size.params if isinstance(size, SizeConfig) else size for size in value]
            twice = next((target for target in targets if targets.count(target) > 1), None)
            if twice is not None:
                raise ValueError(f"the size {twice} appears twice: merge the two")
        return value

    @model_validator(mode="after")
    def _a_choice_needs_a_budget(self) -> SweepConfig:
        if self.sizes == "auto" and (self.budget is None or self.budget.flops is None):
            raise ValueError("sizes: auto fills a budget: give budget: {flops: ...}")
        return self

    def ladder_sizes(self) -> list[SizeConfig]:
        """The sizes as mappings, the largest first because its trunk takes longest; empty if `sizes` is auto."""
        if isinstance(self.sizes, str):
            return []
        found = [size if isinstance(size, SizeConfig) else SizeConfig(params=size) for size in self.sizes]
        return sorted(found, key=lambda size: -size.params)
