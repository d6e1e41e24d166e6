"""The three approaches: each gives its part of law.json, and the replicates by which approaches are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError
from bigtrain.scaling import diagnostics, envelope, isoflop, law, lines, parametric
from bigtrain.scaling.bootstrap import bootstrap, interval
from bigtrain.scaling.document import pack
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.objective import LossFunction, Problem
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.runs.table import RunTable, refuse_collinear

CHECK_REPLICATES = 250
"""Bootstrap replicates of the loss functions other than the first: enough to test whether they agree with it."""


@dataclass(frozen=True)
class Result:
    """The result of one approach, with its bootstrap replicates at the target."""

    result: dict[str, Any]
    """The approach's part of law.json; with the key "refused" if the approach was not possible."""
    exponent: FloatArray | None = None
    """Replicates of the exponent a of N* ~ C^a, shape (R,)."""
    ln_params: FloatArray | None = None
    """Replicates of ln N* at the target, shape (R,)."""
    fitted: parametric.ParametricFit | None = None
    """The fit of approach 3; None for other approaches."""
    window_spread: tuple[float, float] = (0.0, 0.0)
    """Largest change of the exponent and of ln N* at the target over the windows that approach 2 tries."""
    frontier: Frontier | None = None
    """The points of the frontier that approaches 1 and 2 find; None for approach 3."""


@dataclass(frozen=True)
class Frontier:
    """The points of lowest loss at m values of FLOPs that an approach has found."""

    flops: FloatArray
    """FLOPs of the points, shape (m,)."""
    loss: FloatArray
    """Losses of the points, shape (m,)."""
    replicates: FloatArray
    """Bootstrap replicates of the losses, shape (R, m), NaN where a replicate has no point.

    The shape is (0, m) if the points are measured runs.
    """


def run_approaches(
    table: RunTable, clusters: npt.NDArray[np.int64], target: float, options: FitOptions
) -> dict[str, Result]:
    """Run each approach that the options name; with "all", an approach that is not possible is reported as refused.

    Args:
        table: The runs.
        clusters: Cluster of each run, shape (n,), numbered from 0.
        target: The target's FLOPs.
        options: The approaches and their settings.

    Returns:
        Results by name: "a1", "a2", and "a3_" with the name of a loss function.

    Raises:
        UserError: The chosen approach is not possible with these runs, or no approach is.
    """
    found: dict[str, Result] = {}
    for name, one in (("a1", _envelope), ("a2", _isoflop)):
        if options.approach in (name, "all"):
            try:
                found[name] = one(table, clusters, target, options)
            except UserError as error:
                if options.approach != "all":
                    raise
                found[name] = Result({"refused": error.what, "fix": error.fix})
    if options.approach in ("a3", "all"):
        for function in options.functions:
            try:
                found[f"a3_{function}"] = _parametric(table, clusters, target, options, function)
            except UserError as error:
                # The cause lies in the runs and holds for every loss function, but approaches 1 and 2 may be possible.
                if options.approach == "a3" or options.loss_function is not None or len(found) < 1:
                    raise
                found[f"a3_{function}"] = Result({"refused": error.what, "fix": error.fix})
    if all("refused" in one.result for one in found.values()):
        reasons = "; ".join(f"{name}: {one.result['refused']}" for name, one in found.items())
        raise UserError(f"No approach fits these runs. {reasons}", table.source)
    return found


def _envelope(table: RunTable, clusters: npt.NDArray[np.int64], target: float, options: FitOptions) -> Result:
    one = envelope.fit(table, clusters, options.seed, options.replicates)
    details = {
        "hull_points": len(one.rows), "hull_models": len({table.group[i] for i in one.rows}),
        "hull": [{"flops": table.flops[i], "params": table.params[i], "tokens": table.tokens[i],
                  "loss": table.loss[i]} for i in one.rows],
    }  # fmt: skip
    frontier = Frontier(table.flops[one.rows], table.loss[one.rows], np.empty((0, len(one.rows))))
    return _line_result(one.lines, one.replicates, target, details, (0.0, 0.0), frontier)


def _isoflop(table: RunTable, clusters: npt.NDArray[np.int64], target: float, options: FitOptions) -> Result:
    one = isoflop.fit(table, clusters, options.seed, options.replicates)
    ln_params = float(np.log(lines.params_at(one.lines.as_array(), target)))
    moved = [(0.0, 0.0)]
    sensitivity: list[dict[str, Any]] = []
    for name, other in one.sensitivity:
        if other is None:
            sensitivity.append({"window": name, "a": None, "b": None, "target_params": None})
            continue
        params = float(lines.params_at(other.as_array(), target))
        sensitivity.append({"window": name, "a": other.params_slope, "b": other.tokens_slope, "target_params": params})
        if name != "all points":
            moved.append((abs(other.params_slope - one.lines.params_slope), abs(math.log(params) - ln_params)))
    details = {
        "window_rule": f"the points around the lowest whose loss is at most {isoflop.WINDOW:.0%} above it, at least "
        f"{isoflop.MIN_SIDE} on each side",
        "window_sensitivity": sensitivity,
        "budgets": [
            {"flops": b.flops, "runs": len(b.rows), "window_runs": len(b.window),
             "window_tokens": [float(table.tokens[b.window].min()), float(table.tokens[b.window].max())],
             "params": b.params, "tokens": b.tokens, "loss": b.loss,
             "parabola_in_ln_tokens": list(b.parabola), "refused": b.refused or None}
            for b in one.budgets
        ],
    }  # fmt: skip
    good = [b for b in one.budgets if not b.refused]
    frontier = Frontier(np.array([b.flops for b in good]), np.array([b.loss for b in good]), one.minima)
    spread = max(a for a, _ in moved), max(n for _, n in moved)
    return _line_result(one.lines, one.replicates, target, details, spread, frontier)


def _line_result(
    found: lines.Lines, replicates: FloatArray, target: float, details: dict[str, Any], spread: tuple[float, float],
    frontier: Frontier,
) -> Result:  # fmt: skip
    own = found.as_array()
    with np.errstate(over="ignore", invalid="ignore"):
        params, tokens = lines.params_at(replicates, target), lines.tokens_at(replicates, target)
        ratio = tokens / params
    names = ("a", "ln_params_at_1_flop", "b", "ln_tokens_at_1_flop")
    values = dict(zip(names, own.tolist(), strict=True))
    result = {
        **values,
        "params_coefficient": math.exp(found.params_intercept), "tokens_coefficient": math.exp(found.tokens_intercept),
        "interval": {name: interval(replicates[:, i]) for i, name in enumerate(names)},
        "standard_error": {name: deviation(replicates[:, i]) for i, name in enumerate(names)},
        "target": {
            "flops": target,
            "params": with_interval(float(lines.params_at(own, target)), params),
            "tokens": with_interval(float(lines.tokens_at(own, target)), tokens),
            "tokens_per_param": with_interval(
                float(lines.tokens_at(own, target) / lines.params_at(own, target)), ratio
            ),
        },
        "replicates_used": float(np.isfinite(replicates).all(axis=1).mean()), **details, "replicates": pack(replicates),
    }  # fmt: skip
    with np.errstate(divide="ignore"):
        return Result(result, replicates[:, 0], np.log(params), window_spread=spread, frontier=frontier)


def _parametric(
    table: RunTable, clusters: npt.NDArray[np.int64], target: float, options: FitOptions, function: LossFunction
) -> Result:
    problem = Problem.of(
        table.params, table.tokens, table.loss, function, options.delta, options.equal_exponents
    )  # fmt: skip
    refuse_collinear(table, problem.basis.shape[1])
    fitted = parametric.fit(problem, options.seed, options.starts)
    _refuse_no_optimum(fitted.theta, target, table.source)
    count = options.replicates if function == options.functions[0] else min(options.replicates, CHECK_REPLICATES)
    refits = bootstrap(problem, fitted.centred, clusters, options.seed, count, options.processes)
    own, many = law.natural(fitted.theta), law.natural(refits.theta)
    a = law.exponent(refits.theta)
    result: dict[str, Any] = {
        **dict(zip(law.NAMES, own.tolist(), strict=True)), "a": float(law.exponent(fitted.theta)),
        "b": 1 - float(law.exponent(fitted.theta)), "objective": fitted.objective,
        "loss_function": function, "delta": options.delta if function == "huber" else None,
        "interval": {**{name: interval(many[:, i]) for i, name in enumerate(law.NAMES)}, "a": interval(a)},
        "standard_error": {**{name: deviation(many[:, i]) for i, name in enumerate(law.NAMES)}, "a": deviation(a)},
        "target": _at_target(fitted.theta, refits.theta, target),
        "noise": diagnostics.noise(fitted.residuals),
        "search": {
            "starts": fitted.starts, "converged_starts": fitted.converged_starts,
            "projection_objective": fitted.projection_objective, "condition_number": fitted.condition_number,
            "refits_converged": refits.converged, "refits_agreed": refits.agreed,
        },
        "theta": fitted.theta.tolist(), "replicates": pack(refits.theta),
    }  # fmt: skip
    with np.errstate(divide="ignore", over="ignore"):
        ln_params = np.log(law.optimal_params(refits.theta, target))
    return Result(result, a, ln_params, fitted)


def _refuse_no_optimum(theta: FloatArray, target: float, source: str) -> None:
    """Refuse a law whose optimal N or D at the target is below 1.

    Such a law comes from runs that are too short or too similar to show the effect of N or D.
    """
    best = {"parameters": float(law.optimal_params(theta, target)), "tokens": float(law.optimal_tokens(theta, target))}
    missing = next((name for name, value in best.items() if not value >= 1.0), None)
    if missing is not None:
        raise UserError(
            f"The losses do not show the effect of more {missing}: the best number of them for {target:.3g} FLOPs "
            f"would be {best[missing]:.1g}", source, "Train longer, and at sizes that are further apart.",
        )  # fmt: skip


def _at_target(theta: FloatArray, many: FloatArray, flops: float) -> dict[str, Any]:
    quantities = {
        "params": law.optimal_params, "tokens": law.optimal_tokens, "loss": law.optimal_loss,
        "tokens_per_param": lambda at, c: law.optimal_tokens(at, c) / law.optimal_params(at, c),
    }  # fmt: skip
    return {
        "flops": flops,
        **{name: with_interval(float(one(theta, flops)), one(many, flops)) for name, one in quantities.items()},
    }


def with_interval(value: float, replicates: FloatArray) -> dict[str, Any]:
    """A value with its 95 % and 80 % percentile intervals of replicates of shape (R,)."""
    return {"value": value, "interval": interval(replicates), "interval_80": interval(replicates, 0.8)}


def deviation(values: FloatArray) -> float:
    """Standard deviation of the finite replicates; NaN for fewer than two."""
    known = values[np.isfinite(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else float("nan")
