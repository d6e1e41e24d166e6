"""The trials of a sweep: a trunk for each size and seed, a branch for each D, and runs that tune the learning rate.

A trunk trains at a constant learning rate after its warm-up, and saves a checkpoint at each step where a branch starts.
A branch starts from the full state of such a checkpoint, and decays the learning rate until the end of its D. A trunk
and a branch together equal one run of the warm-up-stable-decay schedule, step by step and bit by bit. Lengths that are
added later get the missing trials: their branches, and a further segment of the trunk from its nearest saved step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from bigtrain.config import UserError, yaml_file
from bigtrain.run import RunConfig
from bigtrain.sweeps.config import SizeConfig
from bigtrain.sweeps.ladder import Rung
from bigtrain.sweeps.load import Sweep
from bigtrain.tracking.numbers import short

Kind = Literal["trunk", "branch", "tuning"]
PHASES: dict[Kind, str] = {"trunk": "stable", "branch": "decayed", "tuning": "tuning"}


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    kind: Kind
    size: int
    """Target N of the trial's rung."""
    seed: int
    lr: float
    """Learning rate at the peak."""
    group: str
    """Name of the trunk's group: the runs of a group share the noise of their trunk."""
    steps: int
    """Number of steps at the trial's end, including those before `parent_step`."""
    parent: str | None = None
    """Name of the trial whose checkpoint this trial starts from; None: it starts at step 0."""
    parent_step: int = 0
    """Step of that checkpoint; 0 without a parent."""
    save_at: tuple[int, ...] = ()
    """Steps at which the trial saves a checkpoint for a branch."""
    params: int = 0
    """N, as the law counts it."""
    params_without_embeddings: int = 0
    params_total: int = 0
    tokens: int = 0
    """Planned D at the trial's end: its steps times the tokens of a batch."""
    flops: float = 0.0
    """Exact FLOPs of all steps up to the trial's end, including those before `parent_step`."""

    @property
    def own_steps(self) -> int:
        """Number of steps that the trial itself trains."""
        return self.steps - self.parent_step

    @property
    def own_flops(self) -> float:
        """FLOPs of the steps that the trial itself trains."""
        return self.flops * self.own_steps / self.steps

    def plain(self) -> dict[str, Any]:
        """The trial as plain values for JSON, as in the journal."""
        return {**asdict(self), "save_at": list(self.save_at)}

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Trial:
        """The inverse of `plain`; keys that a newer bigtrain has added are ignored."""
        known = {field.name for field in fields(cls)}
        kept = {name: item for name, item in value.items() if name in known}
        return cls(**{**kept, "save_at": tuple(kept.get("save_at", ()))})


def label(target: int) -> str:
    """Name of a size, such as "n20k"."""
    return f"n{short(float(target))}"


def group_name(target: int, seed: int) -> str:
    """Name of the group of a size and seed, such as "n20k-s1337"."""
    return f"{label(target)}-s{seed}"


def lengths(sweep: Sweep, size: SizeConfig, rung: Rung) -> list[int]:
    """Number of steps of each D of a size, in rising order.

    Raises:
        UserError: Two D have the same number of steps, or the warm-up does not end before the shortest run's decay.
    """
    if size.tokens is not None:
        wanted: list[float] = [float(count) for count in size.tokens]
    else:
        wanted = [ratio * rung.params for ratio in size.tokens_per_param or sweep.config.tokens_per_param]
    steps = sorted(rung.steps(tokens) for tokens in wanted)
    where = f"{sweep.where}, size {size.params}"
    if len(set(steps)) < len(steps):
        raise UserError(
            f"Two lengths round to the same number of steps, {max(steps, key=steps.count)} steps of "
            f"{rung.batch_tokens} tokens", where,
            "Move them apart, or lower ladder.batch.",
        )  # fmt: skip
    if rung.warmup_steps > decay_start(sweep, steps[0]):
        raise UserError(
            f"The warm-up of {rung.warmup_steps} steps does not end before the decay of the shortest run, "
            f"{steps[0]} steps", where, "Shorten ladder.warmup, or lengthen the shortest run.",
        )  # fmt: skip
    return steps


def decay_start(sweep: Sweep, steps: int) -> int:
    """The step at which the branch of a run of so many steps leaves the trunk."""
    return steps - max(1, round(sweep.config.ladder.decay * steps))


def tuning_trials(sweep: Sweep, rung: Rung) -> list[Trial]:
    """The runs from which a size's learning rate is chosen, by rising learning rate."""
    rates = sweep.config.learning_rates
    assert rates is not None
    steps = rung.steps(rates.tokens_per_param * rung.params)
    seed = sweep.config.seeds[0]
    found = []
    for factor in sorted(rates.factors):
        lr = float(f"{rung.lr * factor:.3g}")
        name = f"{group_name(rung.target, seed)}-lr{lr:g}"
        found.append(_trial(rung, name, "tuning", seed, lr, name, steps))
    return found


def grid_trials(
    sweep: Sweep, rung: Rung, lr: float, seeds: Iterable[int], steps: Sequence[int], planned: Iterable[Trial] = ()
) -> list[Trial]:
    """The trunks and branches that a size still needs, each trunk before its branches.

    Args:
        sweep: The sweep.
        rung: The size.
        lr: The learning rate at the peak.
        seeds: Seeds of the trunks.
        steps: Numbers of steps of the runs of each seed.
        planned: Trials that the sweep has already.

    Raises:
        UserError: Planned trials of this size have another shape, batch or learning rate.
    """
    known = [one for one in planned if one.size == rung.target and one.kind != "tuning"]
    _check_same(sweep, rung, lr, known)
    found: list[Trial] = []
    for seed in seeds:
        group = group_name(rung.target, seed)
        segments = [one for one in known if one.group == group and one.kind == "trunk"]
        have = {one.steps for one in known if one.group == group and one.kind == "branch"}
        missing = [length for length in sorted(steps) if length not in have]
        saved = {step: segment.name for segment in segments for step in segment.save_at}
        starts = {decay_start(sweep, length) for length in missing}
        needed = sorted(starts - set(saved))
        if needed and (len(missing) > 1 or segments):
            before = [step for step in saved if step < needed[0]]
            parent_step = max(before, default=0)
            name = f"{group}-trunk" + (f"-{len(segments) + 1}" if segments else "")
            segment = _trial(
                rung, name, "trunk", seed, lr, group, needed[-1],
                parent=saved.get(parent_step), parent_step=parent_step, save_at=tuple(needed),
            )  # fmt: skip
            found.append(segment)
            saved.update(dict.fromkeys(needed, name))
        for length in missing:
            start = decay_start(sweep, length)
            source = saved.get(start)
            found.append(
                _trial(
                    rung, f"{group}-d{length}", "branch", seed, lr, group, length,
                    parent=source, parent_step=start if source else 0,
                )
            )  # fmt: skip
    return found


def _check_same(sweep: Sweep, rung: Rung, lr: float, known: Sequence[Trial]) -> None:
    """Refuse to add runs to a size whose known trials have another N, batch or learning rate."""
    for one in known:
        before = (one.params, one.tokens // one.steps, one.lr)
        now = (rung.params, rung.batch_tokens, lr)
        if before != now:
            names = ("parameters", "tokens a batch", "learning rate")
            changed = [f"{n} {a:g} -> {b:g}" for n, a, b in zip(names, before, now, strict=True) if a != b]
            raise UserError(
                f"The size {rung.target} has trials of another kind ({one.name}): {', '.join(changed)}",
                f"{sweep.where}, sizes", "Undo the change, or give the sweep another name.",
            )  # fmt: skip


def _trial(rung: Rung, name: str, kind: Kind, seed: int, lr: float, group: str, steps: int, **more: Any) -> Trial:
    return Trial(
        name, kind, rung.target, seed, lr, group, steps, params=rung.params,
        params_without_embeddings=rung.params_without_embeddings, params_total=rung.params_total,
        tokens=steps * rung.batch_tokens, flops=rung.flops(steps), **more,
    )  # fmt: skip


def trial_config(sweep: Sweep, rung: Rung, trial: Trial) -> RunConfig:
    """The config of a trial.

    Raises:
        UserError: The base run is wrong, or does not fit the keys that the sweep sets.
    """
    ladder = sweep.config.ladder
    warmup = f"{rung.warmup_steps} steps"
    schedule: dict[str, Any] = {"name": "constant", "warmup": warmup}
    if trial.kind != "trunk":
        decay = trial.steps - decay_start(sweep, trial.steps)
        schedule = {
            "name": "wsd", "warmup": warmup, "decay": f"{decay} steps", "shape": ladder.decay_shape,
            "final_lr": ladder.final_lr * trial.lr,
        }  # fmt: skip
    sections: dict[str, Any] = {
        "name": trial.name, "seed": trial.seed, "model": rung.model, "batch": {"size": rung.batch_sequences},
        "duration": f"{trial.steps} steps", "schedule": schedule, "optimizer": _optimizer(sweep, rung, trial),
        "tracking": {"group": sweep.config.name, "facts": facts(trial)},
    }  # fmt: skip
    for key, value in rung.keys.items():
        section, _, name = key.partition(".")
        sections[section] = {**sections.get(section, {}), name: value}
    if trial.save_at:
        sections["checkpoint"] = {"at": [f"{step} steps" for step in trial.save_at]}
    if trial.parent is not None:
        sections["init"] = {"source": f"{trial.parent}@{trial.parent_step}", "state": "all"}
    return sweep.trial(sections)


def _optimizer(sweep: Sweep, rung: Rung, trial: Trial) -> dict[str, Any]:
    """Keys of the section `optimizer`: the learning rate, and for Adam and AdamW the betas."""
    optimizer: dict[str, Any] = {"lr": trial.lr}
    base = sweep.document.value.get("optimizer")
    if not isinstance(base, dict) or base.get("name", "adamw") in ("adamw", "adam"):
        optimizer["betas"] = [0.9, rung.beta2]
    return optimizer


def facts(trial: Trial) -> dict[str, str | int | float]:
    """The values of a trial that a fit needs in addition to its losses; they are keys of its W&B config."""
    return {
        "group": trial.group, "kind": trial.kind, "phase": PHASES[trial.kind], "params": trial.params,
        "params_without_embeddings": trial.params_without_embeddings, "params_total": trial.params_total,
        "flops": trial.flops,
    }  # fmt: skip


def config_text(config: RunConfig) -> str:
    """A trial's config as YAML."""
    return yaml_file.dump(config.plain())
