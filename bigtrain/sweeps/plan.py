"""`bigtrain sweep plan`: the grid, its cost in FLOPs, time and money, and its expected interval at the target."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain import storage
from bigtrain.config import UserError
from bigtrain.scaling.bootstrap import MIN_CLUSTERS
from bigtrain.scaling.document import finite
from bigtrain.scaling.runs.table import refuse_collinear
from bigtrain.sweeps import design
from bigtrain.sweeps.config import SizeConfig
from bigtrain.sweeps.cost import Clock, check_budget, clock_of, cost_of, planned_machine, trials_to_run
from bigtrain.sweeps.journal import SweepDirectory
from bigtrain.sweeps.ladder import Rung, rung
from bigtrain.sweeps.load import Sweep
from bigtrain.sweeps.memory import least_memory_bytes
from bigtrain.sweeps.pairs import expect_pair
from bigtrain.sweeps.proposals import proposal_lines, propose
from bigtrain.sweeps.record import check_same, sizes_of
from bigtrain.sweeps.slots import TrialStarter, starter_of
from bigtrain.sweeps.trials import lengths
from bigtrain.tracking.numbers import short, span

FORMAT_VERSION = 1
KIND = "bigtrain sweep plan"
MANY_EPOCHS = 4.0
"""Number of epochs above which repeated data improve the loss less than new data (Muennighoff et al. 2023)."""
DEFAULT_TARGET = 10.0
"""FLOPs of the target relative to the largest run, if the sweep names no target."""
LAW_PARAMETERS = 5
"""Number of the law's parameters: A, B, E, alpha and beta."""
SMALLEST = 1000
"""Smallest N of a size that `sizes: auto` proposes."""


def make_plan(
    sweep: Sweep,
    runs_dir: Path,
    *,
    measure: bool = True,
    say: Callable[[str], None],
    starter: TrialStarter | None = None,
    compare: bool = False,
    rates: Path | None = None,
) -> dict[str, Any]:
    """Plan a sweep, and write plan.json and plan.html into its directory.

    Args:
        sweep: The sweep.
        runs_dir: The directory that holds the sweep's directory.
        measure: Whether tokens per second that are not known are measured.
        say: A function that prints a line of progress.
        starter: The slots that would run the trials; None: the slots of the sweep's section `slots`.
        compare: Whether two recipes will be compared on this grid.
        rates: A file with laws of the learning rate and the batch; None: the law of the sweep's own tuning runs.

    Returns:
        Plain values for JSON: sizes, trials, cost, expected interval, warnings.

    Raises:
        UserError: The grid does not determine the law, the target is not above the largest run, or the sweep exceeds
            its budget.
    """
    starter = starter or starter_of(sweep)
    directory = SweepDirectory(runs_dir / sweep.config.name)
    check_same(sweep, directory)
    if sweep.config.sizes == "auto":
        return _write(directory, _chosen(sweep, say))
    sizes = sizes_of(sweep)
    rungs = {size.params: rung(sweep, size) for size in sizes}
    steps = {size.params: lengths(sweep, size, rungs[size.params]) for size in sizes}
    grid, rows = _grid(sweep, sizes, rungs, steps)
    target = _target(sweep, grid)
    truth = design.truth_of(sweep.config.expected)
    refuse_collinear(grid.table(truth, sweep.where), LAW_PARAMETERS)
    trials = trials_to_run(sweep, sizes, rungs, steps, directory)
    with contextlib.closing(starter):
        clock = clock_of(sweep, rungs, trials, directory, starter, measure, say)
    cost = cost_of(sweep, trials, clock, starter.slots)
    check_budget(sweep, trials, clock, starter.slots, directory)
    say(f"simulating {design.DRAWS} sweeps of this grid")
    expected = design.simulate(grid, sweep.config.expected, target, design.DRAWS)
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "kind": KIND, "name": sweep.config.name, "target_flops": target,
        "sizes": [_size_row(sweep, rungs[size.params], steps[size.params], clock) for size in sizes],
        "points": rows, "trials": [{**trial.plain(), "seconds": clock.seconds(trial)} for trial in trials],
        "cost": cost, "assumed": sweep.config.expected.plain(),
        "expected": {**asdict(expected), "width": expected.width},
        "slots": starter.slots, "largest_run_flops": float(grid.flops.max()),
        "warnings": _warnings(sweep, grid, rungs, steps, starter),
        "compare": asdict(expect_pair(grid, sweep.config.expected)) if compare else None,
        "proposals": propose([rungs[one.params] for one in sizes], [steps[one.params] for one in sizes], rates,
                             directory),
    }  # fmt: skip
    return _write(directory, document)


def _write(directory: SweepDirectory, document: dict[str, Any]) -> dict[str, Any]:
    from bigtrain.sweeps.page import plan_page

    document = dict(finite(document))
    directory.path.mkdir(parents=True, exist_ok=True)
    document["files"] = [str(directory.plan), str(directory.page)]
    storage.write_json(directory.plan, document)
    storage.write_atomic(directory.page, plan_page(document))
    return document


def _grid(
    sweep: Sweep, sizes: Sequence[SizeConfig], rungs: dict[int, Rung], steps: dict[int, list[int]]
) -> tuple[design.Grid, list[dict[str, Any]]]:
    """All runs of the grid, as arrays and as rows of plain values."""
    rows: list[dict[str, Any]] = []
    trunk = 0
    for size in sizes:
        one = rungs[size.params]
        for seed in size.seeds or sweep.config.seeds:
            for length in steps[size.params]:
                tokens = length * one.batch_tokens
                rows.append({
                    "size": size.params, "seed": seed, "params": one.params, "tokens": tokens, "trunk": trunk,
                    "flops": one.flops(length), "tokens_per_param": tokens / one.params,
                })  # fmt: skip
            trunk += 1

    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype=np.float64)

    grid = design.Grid(column("params"), column("tokens"), column("flops"), column("trunk").astype(np.int64))
    return grid, rows


def _target(sweep: Sweep, grid: design.Grid) -> float:
    largest = float(grid.flops.max())
    if sweep.config.target is None:
        return DEFAULT_TARGET * largest
    if sweep.config.target.flops <= largest:
        raise UserError(
            f"The target of {sweep.config.target.flops:.4g} FLOPs lies inside the data: the largest run has "
            f"{largest:.4g}", f"{sweep.where}, target.flops", f"Give more than {largest:.4g}, or smaller sizes.",
        )  # fmt: skip
    return sweep.config.target.flops


def _size_row(sweep: Sweep, one: Rung, steps: Sequence[int], clock: Clock) -> dict[str, Any]:
    speed = clock.speeds.get(one.target)
    longest = steps[-1] * one.batch_tokens
    return {
        "target": one.target, "model": one.model, "params": one.params,
        "params_without_embeddings": one.params_without_embeddings, "params_total": one.params_total,
        "flops_per_token": one.flops_per_token, "flops_over_6n": one.flops_per_token / (6 * one.params),
        "batch_tokens": one.batch_tokens, "lr": one.lr, "hidden_lr": one.hidden_lr, "beta2": one.beta2,
        "warmup_steps": one.warmup_steps,
        "steps": list(steps), "tokens": [count * one.batch_tokens for count in steps],
        "tokens_per_param": [count * one.batch_tokens / one.params for count in steps],
        "epochs": longest / (one.sequences_per_epoch * one.context), "deviations": list(one.deviations),
        "tokens_per_s": speed.tokens_per_s if speed else None, "start_s": speed.start_s if speed else None,
    }  # fmt: skip


def _warnings(
    sweep: Sweep, grid: design.Grid, rungs: dict[int, Rung], steps: dict[int, list[int]], starter: TrialStarter
) -> list[str]:
    found = []
    if grid.trunks < MIN_CLUSTERS:
        found.append(
            f"{grid.trunks} trunks: with fewer than {MIN_CLUSTERS} the fit's intervals are too narrow; add seeds"
        )
    for target, one in rungs.items():
        config = sweep.trial({"name": "probe", "duration": "1 steps", "batch": {"size": 1}, "model": one.model})
        # Only a plan for this machine can check its memory.
        if sweep.config.hardware.mfu is None and planned_machine(sweep) is None:
            cause = starter.refusal(config, least_memory_bytes(config, one.vocab_size))
            if cause is not None:
                found.append(f"size {target} can never run here: {cause}")
        epochs = steps[target][-1] * one.batch_sequences / one.sequences_per_epoch
        if epochs > MANY_EPOCHS:
            found.append(
                f"size {target}: its longest run reads the data {epochs:.1f} times; the law assumes fresh data"
            )
    return found


def _chosen(sweep: Sweep, say: Callable[[str], None]) -> dict[str, Any]:
    """The plan of a sweep with `sizes: auto`: the grids that use up the budget, the narrowest interval first."""
    budget = sweep.config.budget
    assert budget is not None
    assert budget.flops is not None
    if sweep.config.target is None:
        raise UserError(
            "sizes: auto chooses the grid by the interval at the target, but no target is given", sweep.where,
            "Give target: {flops: ...}.",
        )  # fmt: skip
    target = sweep.config.target.flops
    found = design.choose(budget.flops, sweep.config.expected, target, sweep.config.ladder.decay, SMALLEST, say)
    if not found:
        raise UserError(
            f"No grid of {budget.flops:.4g} FLOPs has a target of {target:.4g} FLOPs outside it", sweep.where,
            "Raise the budget, or the target.",
        )  # fmt: skip
    grids = [
        {**asdict(one), "width": one.expected.width if one.expected else None, "sizes": list(one.sizes),
         "tokens_per_param": list(one.tokens_per_param)}
        for one in found
    ]  # fmt: skip
    return {
        "format_version": FORMAT_VERSION, "kind": KIND, "name": sweep.config.name, "target_flops": target,
        "budget_flops": budget.flops, "grids": grids,
    }  # fmt: skip


def plan_text(plan: dict[str, Any]) -> str:
    """A plan as text for a terminal."""
    if "grids" in plan:
        return _grids_text(plan)
    header = (
        "N",
        "total",
        "layers x width",
        "C/6ND",
        "batch",
        "lr",
        "beta2",
        "warm-up",
        "D/N",
        "longest D",
        "tokens/s",
    )
    from bigtrain.sweeps.page import lr_text

    rows = [header]
    for one in plan["sizes"]:
        shape = one["model"]
        rows.append((
            f"{one['params']:,}", f"{one['params_total']:,}", f"{shape.get('layers', '')} x {shape.get('width', '')}",
            f"{one['flops_over_6n']:.2f}", f"{one['batch_tokens']:,}", lr_text(one), f"{one['beta2']:g}",
            f"{one['warmup_steps']} steps", " ".join(f"{ratio:.3g}" for ratio in one["tokens_per_param"]),
            short(one["tokens"][-1]), short(one["tokens_per_s"]) if one["tokens_per_s"] else "n/a",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        f"{plan['name']}: {len(plan['points'])} runs of {len(plan['sizes'])} sizes, {len(plan['trials'])} trials to do"
    ]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for one in plan["sizes"]:
        if one["deviations"]:
            lines.append(f"  {one['target']:,}: {'; '.join(one['deviations'])}")
    lines += [*_cost_lines(plan), *_expected_lines(plan)]
    return "\n".join([*lines, *(f"warning: {text}" for text in plan["warnings"]), *plan["files"]])


def _cost_lines(plan: dict[str, Any]) -> list[str]:
    cost = plan["cost"]
    money = f"{cost['usd']:,.2f} USD at {cost['usd_per_hour']:g} an hour" if cost["usd"] is not None else "n/a"
    time = f"{span(cost['seconds'])} on {plan['slots']} slots" if cost["seconds"] is not None else "n/a"
    return [
        f"FLOPs   {cost['flops']:.3g}; {cost['saved']:.0%} less than separate runs, by trunks that branches share",
        f"time    {time} ({cost['time_by']})",
        f"money   {money}",
    ]


def _expected_lines(plan: dict[str, Any]) -> list[str]:
    one = plan["expected"]
    low, high = one["loss_interval"]
    few, many = one["params_interval"]
    return [
        f"target  {plan['target_flops']:.3g} FLOPs, {plan['target_flops'] / plan['largest_run_flops']:.3g} times the "
        "largest run",
        f"expected there, 95 % of {one['draws']} simulated sweeps: loss {low:.4f} to {high:.4f} "
        f"({one['width']:.2%} wide), N* {short(few)} to {short(many)}",
        *_compare_lines(plan),
        *proposal_lines(plan.get("proposals")),
    ]


def _compare_lines(plan: dict[str, Any]) -> list[str]:
    pair = plan.get("compare")
    if not pair:
        return []
    return [
        f"pair    two recipes on this ladder, 95 % interval of the compute multiplier: {pair['paired_width']:.1%} wide "
        f"with the same seeds, {pair['unpaired_width']:.1%} with other seeds; {pair['flops']:.3g} FLOPs for both"
    ]


def _grids_text(plan: dict[str, Any]) -> str:
    lines = [
        f"{plan['name']}: grids of {plan['budget_flops']:.3g} FLOPs, by the interval at {plan['target_flops']:.3g}"
    ]
    for one in plan["grids"]:
        sizes = ", ".join(short(size) for size in one["sizes"])
        ratios = ", ".join(f"{ratio:g}" for ratio in one["tokens_per_param"])
        lines.append(
            f"  {one['width']:.2%} wide  {one['flops']:.3g} FLOPs  sizes [{sizes}]  D/N [{ratios}]  "
            f"{one['seeds']} seeds"
        )
    best = plan["grids"][0]
    lines += [
        "write into the file:",
        f"  sizes: {best['sizes']}",
        f"  tokens_per_param: {best['tokens_per_param']}",
        f"  seeds: {list(range(1, best['seeds'] + 1))}",
    ]
    return "\n".join([*lines, *plan["files"]])
