"""The cost of a sweep in FLOPs, time and money, and the check against its budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bigtrain.config import UserError
from bigtrain.hardware import lookup
from bigtrain.hardware.cluster import Cluster, cluster
from bigtrain.hardware.devices import Device, known_devices
from bigtrain.hardware.this_machine import this_machine
from bigtrain.planning.estimate import Job
from bigtrain.sweeps.bench import Speed, measure
from bigtrain.sweeps.config import SizeConfig
from bigtrain.sweeps.journal import SweepDirectory, read_state
from bigtrain.sweeps.ladder import Rung
from bigtrain.sweeps.load import Sweep
from bigtrain.sweeps.slots import TrialStarter
from bigtrain.sweeps.trials import Trial, grid_trials, lengths, trial_config, tuning_trials

EVALUATION_COST = 1 / 3
"""Cost of a held-out token relative to a training token: the forward pass only."""


@dataclass(frozen=True)
class Clock:
    """How long trials take."""

    speeds: dict[int, Speed]
    """Speeds by target N; empty if no speed is known."""
    source: str
    """Where the speeds come from, as text for the user."""
    evaluated_tokens: dict[int, int]
    """Held-out tokens of an evaluation, by target N."""

    def seconds(self, trial: Trial) -> float | None:
        """Seconds from a trial's start to its end; None if the speed of its size is not known."""
        speed = self.speeds.get(trial.size)
        if speed is None:
            return None
        tokens = trial.tokens * trial.own_steps / trial.steps
        return speed.start_s + (tokens + EVALUATION_COST * self.evaluated_tokens[trial.size]) / speed.tokens_per_s


def trials_to_run(
    sweep: Sweep, sizes: Sequence[SizeConfig], rungs: dict[int, Rung], steps: dict[int, list[int]],
    directory: SweepDirectory,
) -> list[Trial]:  # fmt: skip
    """The trials of a sweep that have not finished, in the order in which they are started.

    Args:
        sweep: The sweep.
        sizes: Its sizes.
        rungs: The rung of each size, by target N.
        steps: The numbers of steps of each size's runs, by target N.
        directory: The sweep's directory, whose journal names the trials that were planned before.
    """
    state = read_state(directory.journal)
    found: list[Trial] = [record.trial for record in state.trials.values() if record.state != "finished"]
    planned = state.planned()
    for size in sizes:
        one = rungs[size.params]
        if sweep.config.learning_rates is not None and size.params not in state.chosen:
            found += [trial for trial in tuning_trials(sweep, one) if trial.name not in state.trials]
        seeds = size.seeds or sweep.config.seeds
        found += grid_trials(sweep, one, one.lr, seeds, steps[size.params], planned)
    for trial in found:
        trial_config(sweep, rungs[trial.size], trial)
    return found


def clock_of(
    sweep: Sweep, rungs: dict[int, Rung], trials: Sequence[Trial], directory: SweepDirectory, starter: TrialStarter,
    wanted: bool, say: Callable[[str], None],
) -> Clock:  # fmt: skip
    hardware = sweep.config.hardware
    evaluated = {}
    for target, one in rungs.items():
        config = sweep.trial({"name": "probe", "duration": "1 steps", "batch": {"size": 1}, "model": one.model})
        assert config.evaluation.sequences is not None  # load_sweep sets a default
        evaluated[target] = config.evaluation.sequences * one.context
    if hardware.mfu is not None:
        device = _device(sweep)
        if device is None:
            raise UserError(
                "hardware.mfu is a share of a device's peak, but no device is given", f"{sweep.where}, hardware",
                f"Give hardware.device: {', '.join(known.name for known in known_devices())}.",
            )  # fmt: skip
        precision = str(sweep.document.value.get("precision", "bf16"))
        peak = device.peak(precision)
        if peak is None:
            raise UserError(f"{device.name} has no peak in {precision}", f"{sweep.where}, hardware.device")
        rate = peak * hardware.mfu * sweep.ranks
        speeds = {target: Speed(rate / one.flops_per_token, hardware.start_s) for target, one in rungs.items()}
        return Clock(speeds, f"{hardware.mfu:.0%} of {device.name}'s peak", evaluated)
    elsewhere = planned_machine(sweep)
    if elsewhere is not None:
        speeds = {target: _planned_speed(sweep, one, elsewhere) for target, one in rungs.items()}
        return Clock(speeds, f"the planner, on {elsewhere.name}", evaluated)
    if not wanted:
        return Clock({}, "not measured", evaluated)
    return Clock(measure(sweep, list(rungs.values()), directory, starter, say), "measured here", evaluated)


def planned_machine(sweep: Sweep) -> Cluster | None:
    """The machine for which the planner estimates times.

    Returns:
        None if the sweep's `hardware` names no device, names this machine's device, or sets `mfu`.
    """
    name = sweep.config.hardware.device
    if name is None or sweep.config.hardware.mfu is not None:
        return None
    return None if lookup(this_machine().device_name) == _device(sweep) else _entry(sweep, name)


def _planned_speed(sweep: Sweep, one: Rung, on: Cluster) -> Speed:
    """The planner's estimate of a size's speed, with the layout of the base run."""
    shape = {"name": "probe", "duration": "1 steps", "batch": {"size": one.batch_sequences}, "model": one.model}
    try:
        estimate = Job.of(sweep.trial(shape), one.vocab_size).estimate(on, sweep.ranks)
    except (UserError, ValueError) as error:
        what = error.what if isinstance(error, UserError) else str(error)
        raise UserError(
            f"The planner cannot time the size {one.target:,} on {on.name}: {what}", f"{sweep.where}, hardware",
            "Give hardware.mfu, or remove hardware.device to measure here.",
        ) from None  # fmt: skip
    return Speed(estimate.tokens_per_s, sweep.config.hardware.start_s)


def _entry(sweep: Sweep, name: str) -> Cluster:
    try:
        return cluster(name)
    except UserError as error:
        raise UserError(error.what, f"{sweep.where}, hardware.device", error.fix) from None


def _device(sweep: Sweep) -> Device | None:
    name = sweep.config.hardware.device
    if name is None:
        return lookup(this_machine().device_name)
    return lookup(name) or _entry(sweep, name).device


def _price(sweep: Sweep) -> float | None:
    """Price of one device in US dollars per hour, from the hardware's entry; None if it has none."""
    name = sweep.config.hardware.device
    device = _device(sweep) if name is None else lookup(name)
    if device is not None or name is None:
        return device.usd_per_hour if device else None
    return _entry(sweep, name).price


def cost_of(sweep: Sweep, trials: Sequence[Trial], clock: Clock, slots: int) -> dict[str, Any]:
    """FLOPs, seconds and US dollars of trials, as plain values for JSON; None where a value is not known."""
    own = sum(trial.own_flops for trial in trials)
    shared = sum(trial.own_flops for trial in trials if trial.kind != "tuning")
    separate = sum(trial.flops for trial in trials if trial.kind == "branch")
    lasting = [clock.seconds(trial) for trial in trials]
    seconds = None
    busy = None
    if trials and all(one is not None for one in lasting):
        seconds = makespan(trials, [one or 0.0 for one in lasting], slots)
        busy = float(sum(one or 0.0 for one in lasting))
    price = sweep.config.hardware.usd_per_hour or _price(sweep)
    money = None if busy is None or price is None else busy / 3600 * sweep.ranks * price
    return {
        "flops": own, "separate_flops": separate, "saved": 1 - shared / separate if separate else 0.0,
        "seconds": seconds, "slot_seconds": busy, "usd": money, "usd_per_hour": price, "time_by": clock.source,
    }  # fmt: skip


def makespan(trials: Sequence[Trial], seconds: Sequence[float], slots: int) -> float:
    """Seconds from the start of the first trial to the end of the last, if trials start in the given order.

    A branch may start once its trunk has passed the branch's first step.

    Args:
        trials: The trials, each trunk before its branches.
        seconds: Seconds of each trial.
        slots: Number of trials that run at the same time.
    """
    free = [0.0] * slots
    begun: dict[str, tuple[float, float]] = {}
    by_name = {trial.name: trial for trial in trials}
    waiting = list(zip(trials, seconds, strict=True))

    def ready_at(trial: Trial) -> float:
        parent = by_name.get(trial.parent or "")
        if parent is None:
            return 0.0
        if parent.name not in begun:
            return math.inf
        start, length = begun[parent.name]
        return start + length * (trial.parent_step - parent.parent_step) / parent.own_steps

    while waiting:
        slot = free.index(min(free))
        # The trial that is ready first; of several, the first in the list.
        at = [max(free[slot], ready_at(trial)) for trial, _ in waiting]
        chosen = at.index(min(at))
        trial, length = waiting.pop(chosen)
        begun[trial.name] = (at[chosen], length)
        free[slot] = at[chosen] + length
    return max(free)


def check_budget(sweep: Sweep, trials: Sequence[Trial], clock: Clock, slots: int, directory: SweepDirectory) -> None:
    """Refuse trials that exceed the sweep's budget, together with the trials that have finished.

    Raises:
        UserError: The FLOPs, hours or US dollars are above the budget.
    """
    budget = sweep.config.budget
    if budget is None:
        return
    finished = [one.trial for one in read_state(directory.journal).trials.values() if one.state == "finished"]
    cost = cost_of(sweep, [*finished, *trials], clock, slots)
    hours = None if cost["seconds"] is None else cost["seconds"] / 3600
    spent = f", {len(finished)} finished trials included" if finished else ""
    for name, limit, planned in (
        ("flops", budget.flops, cost["flops"]), ("hours", budget.hours, hours), ("usd", budget.usd, cost["usd"])
    ):  # fmt: skip
        if limit is not None and planned is not None and planned > limit:
            raise UserError(
                f"The sweep would cost {planned:.4g} {name}{spent}, but the budget is {limit:.4g}",
                f"{sweep.where}, budget.{name}", "Drop the largest size or the longest runs, or raise the budget.",
            )  # fmt: skip


def require_budget(
    sweep: Sweep, sizes: Sequence[SizeConfig], rungs: dict[int, Rung], directory: SweepDirectory,
    starter: TrialStarter, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Call `check_budget` for all trials that have not finished.

    Tokens per second are measured only if the budget limits hours or money.

    Raises:
        UserError: The FLOPs, hours or US dollars are above the budget.
    """
    budget = sweep.config.budget
    if budget is None:
        return
    steps = {size.params: lengths(sweep, size, rungs[size.params]) for size in sizes}
    trials = trials_to_run(sweep, sizes, rungs, steps, directory)
    timed = budget.hours is not None or budget.usd is not None
    clock = clock_of(sweep, rungs, trials, directory, starter, timed, say)
    check_budget(sweep, trials, clock, starter.slots, directory)
