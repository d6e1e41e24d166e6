"""The checks of a fitted law: held-out runs, back-tests and diagnostics, with the warnings that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtrain.scaling import backtest, bias, diagnostics, law, parametric
from bigtrain.scaling.approaches import Result
from bigtrain.scaling.bootstrap import MIN_CLUSTERS
from bigtrain.scaling.document import unpack
from bigtrain.scaling.forms import Form
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN, FloatArray
from bigtrain.scaling.misfit import misfit_rate, widened
from bigtrain.scaling.objective import Problem
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.runs.numbers import count
from bigtrain.scaling.runs.table import SHOWN, RunTable

FLOPS_DRIFT = 1.15
"""Ratio of the largest to the smallest C / 6 N D above which a warning is given."""
CONDITION, CONVERGED = 1e3, 0.25
"""A warning is given if a parametric fit has a larger condition number, or if a smaller fraction of starts reached the
minimum."""
ZERO_FLOOR = 0.02
"""Fraction of the lowest loss below which E counts as zero, because the runs do not determine it."""
NO_FLOOR_SHARE = 0.05
"""Fraction of replicates with E at zero above which a warning is given."""
NEAR = 0.01
"""Largest relative height above the lowest loss of a range of FLOPs at which a run counts as near the frontier."""
LEAVES = 0.005
"""Least mean log residual of the runs near the frontier for a warning."""
MANY_EPOCHS = 4.0
"""Number of epochs above which repeated data improve the loss less than new data (Muennighoff et al. 2023)."""
NORMAL = {"interval": 1.96, "interval_80": 1.2816}


def judge(
    document: dict[str, Any], table: RunTable, clusters: npt.NDArray[np.int64], fitted: parametric.ParametricFit,
    options: FitOptions,
) -> None:  # fmt: skip
    """Add the held-out errors, misfit, diagnostics and warnings of the primary fit to the document.

    Args:
        document: The content of law.json, which is extended.
        table: The runs.
        clusters: Cluster of each run, shape (n,).
        fitted: The primary fit, by approach 3.
        options: Options of the fit.
    """
    predictor = backtest.parametric_predictor(fitted.problem, table, options.seed)
    hold_out(document, table, clusters, options.seed, predictor, fitted.problem.basis.shape[1])
    target, warnings = document["target_flops"], document["warnings"]
    changes = diagnostics.influence(fitted, clusters, target)
    order = np.argsort(-np.abs(changes))
    members = [np.flatnonzero(clusters == c)[0] for c in range(len(changes))]
    far = diagnostics.outliers(table, fitted, target)
    slopes = diagnostics.trends(table, fitted.residuals)
    biases = bias.suspected(fitted, table.params, table.tokens, clusters, target)
    document["diagnostics"] = {
        "delta_sensitivity": diagnostics.delta_sensitivity(fitted, target),
        "influence": [
            {"name": table.group[members[c]] if options.cluster == "model" else table.run[members[c]],
             "target_loss_change": changes[c]}
            for c in order
        ],
        "outliers": far, "residual_trends": slopes, "bias": [asdict(one) for one in biases],
        "equal_exponents": _equal_exponents(fitted, options.seed, target),
    }  # fmt: skip
    if far["runs"]:
        moved = far["without"]["target_loss"] - float(law.optimal_loss(fitted.theta, target))
        names = ", ".join(f"{one['run']} ({one['residual']:+.2%})" for one in far["runs"][:5])
        warnings.append(
            f"{len(far['runs'])} outliers ({far['rule']}): {names}; without them the loss at the target changes by "
            f"{moved:+.5f}"
        )
    for one in biases[:1]:
        own = float(law.optimal_params(fitted.theta, target))
        warnings.append(
            f"{one.form} lie above the law ({one.standard_errors:.1f} standard errors), as if their warm-up or batch "
            f"were too long: without the {one.runs_left_out} most extreme of them N* at the target is "
            f"{count(one.target_params)} in place of {count(own)}; exclude them, or train them again"
        )
    for name, slope in slopes.items():
        if abs(slope["standard_errors"]) > diagnostics.TREND and not biases:
            warnings.append(
                f"residuals depend on {name}: {slope['slope']:+.2e} of the loss per e-fold "
                f"({abs(slope['standard_errors']):.1f} standard errors): the form of the law does not fit the runs"
            )
    warnings += _floor(document, table)
    warnings += near_frontier(table, fitted.residuals)


def hold_out(
    document: dict[str, Any], table: RunTable, clusters: npt.NDArray[np.int64], seed: int,
    predictor: backtest.Predictor, parameters: int,
) -> None:  # fmt: skip
    """Add the back-tests of the primary fit, and widen the intervals of the loss at the target by their misfit.

    Args:
        document: The content of law.json, which is extended.
        table: The runs.
        clusters: Cluster of each run, shape (n,).
        seed: Seed of the noise in the intervals.
        predictor: The fit that is tested.
        parameters: Number of parameters of the fit.
    """
    warnings = document["warnings"]
    tests = []
    for factor in backtest.FACTORS:
        one = backtest.held_out(table, clusters, seed, factor, predictor, parameters)
        if isinstance(one, str):
            if factor == backtest.HELD_OUT_FACTOR:
                document["held_out"] = {"refused": one}
                warnings.append(f"nothing could be held out: {one}")
            continue
        tests.append(one)
        plain = {
            **asdict(one), "run": table.run[one.row], "params": table.params[one.row],
            "tokens": table.tokens[one.row], "flops": table.flops[one.row], "left_interval": one.left_interval,
        }  # fmt: skip
        document["back_tests"].append(plain)
        if factor == backtest.HELD_OUT_FACTOR:
            document["held_out"] = plain
        if one.left_interval:
            low, high = one.prediction_interval
            warnings.append(
                f"the largest run ({table.run[one.row]}) lies outside the interval that runs below 1/{one.factor:.3g} "
                f"of its FLOPs predict: {one.measured:.5f} measured, {one.predicted:.5f} [{low:.5f}, {high:.5f}] "
                f"predicted, error {one.error:+.2%}; intervals are widened by this misfit"
            )
    rate = misfit_rate([(one.misfit, one.factor) for one in tests])
    # In 6 N D, the FLOPs of the law's optimum and of forecasts; exact FLOPs of small models are several times larger.
    largest = FLOPS_PER_PARAMETER_TOKEN * float((table.params * table.tokens).max())
    document["misfit"] = {"rate": rate, "largest_flops": largest, "tests": len(tests)}
    loss = document["approaches"][document["primary"]]["target"]["loss"]
    efolds = math.log(document["target_flops"] / largest)
    loss["interval_of_parameters"] = loss["interval"]
    for name, normal in NORMAL.items():
        loss[name] = widened(loss["value"], loss[name], rate, efolds, normal)


def _floor(document: dict[str, Any], table: RunTable) -> list[str]:
    one = document["approaches"][document["primary"]]
    floors = np.exp(unpack(one["replicates"])[:, 2])
    least = ZERO_FLOOR * float(table.loss.min())
    share = float((floors < least).mean())
    if one["E"] < least:
        return [f"E is at zero ({one['E']:.2g}): the runs show no floor of the loss; far predictions are too low"]
    if share > NO_FLOOR_SHARE:
        return [f"E is at zero in {share:.0%} of the replicates: the runs hardly show a floor of the loss"]
    return []


def near_frontier(table: RunTable, residuals: FloatArray) -> list[str]:
    """A warning about ranges of FLOPs, each a factor of four wide, where the law misses the runs near the frontier.

    Args:
        table: The runs.
        residuals: ln predicted - ln measured of each run, shape (n,).

    Returns:
        One warning, or none.
    """
    bins = np.floor(np.log(table.flops / table.flops.max() * 1.0000001) / math.log(4.0))
    noise = diagnostics.noise(residuals)
    found = []
    for number in np.unique(bins):
        rows = np.flatnonzero(bins == number)
        near = rows[table.loss[rows] <= table.loss[rows].min() * (1 + NEAR)]
        mean = float(residuals[near].mean())
        if abs(mean) > max(LEAVES, 3 * noise / math.sqrt(len(near))):
            found.append(f"{mean:+.2%} around {table.flops[near].mean():.2g} FLOPs")
    if not found:
        return []
    return [f"the law deviates from the runs near the frontier: predicted over measured is {'; '.join(found)}"]


def _equal_exponents(fitted: parametric.ParametricFit, seed: int, target: float) -> dict[str, Any]:
    problem = fitted.problem
    joined = Problem(
        problem.ln_n, problem.ln_d, problem.ln_loss, problem.center, problem.function, problem.delta, True
    )  # fmt: skip
    other = parametric.fit(joined, seed, starts=4)
    return {
        **dict(zip(law.NAMES, law.natural(other.theta).tolist(), strict=True)), "objective": other.objective,
        "target_loss": float(law.optimal_loss(other.theta, target)),
    }  # fmt: skip


def _unused_budgets(name: str, budgets: Sequence[dict[str, Any]]) -> list[str]:
    """One warning for each reason for which budgets were refused."""
    reasons: dict[str, list[float]] = {}
    for budget in budgets:
        if budget["refused"]:
            reasons.setdefault(budget["refused"], []).append(budget["flops"])
    found = []
    for reason, flops in reasons.items():
        shown = ", ".join(f"{one:.3g}" for one in flops[:SHOWN])
        more = f" and {len(flops) - SHOWN} more" if len(flops) > SHOWN else ""
        many = (
            f"the budget of {shown} FLOPs is" if len(flops) == 1 else f"{len(flops)} budgets ({shown}{more} FLOPs) are"
        )
        found.append(f"{name}: {many} not used: {reason}")
    return found


def warnings_of(
    table: RunTable, clusters: npt.NDArray[np.int64], found: dict[str, Result], options: FitOptions
) -> list[str]:
    """The warnings about the table and about the result of each approach.

    Args:
        table: The runs.
        clusters: Cluster of each run, shape (n,).
        found: Results by the name of the approach.
        options: Options of the fit.
    """
    warnings = []
    groups = int(clusters.max()) + 1
    if groups < MIN_CLUSTERS:
        warnings.append(
            f"{groups} clusters ({options.cluster}): with fewer than {MIN_CLUSTERS} the intervals are too narrow"
        )
    share = table.flops / (FLOPS_PER_PARAMETER_TOKEN * table.params * table.tokens)
    if table.flops_exact and share.max() > FLOPS_DRIFT * share.min():
        warnings.append(
            f"exact FLOPs are {share.min():.2f} to {share.max():.2f} times 6 N D: N* and D* of approach 3 take 6 N D, "
            "approaches 1 and 2 the exact ones"
        )
    if table.unique_tokens is not None and not (options.form and Form.parse(options.form).needs_unique):
        epochs = float(np.nanmax(table.tokens / table.unique_tokens))
        if epochs > MANY_EPOCHS:
            warnings.append(
                f"runs read their data up to {epochs:.1f} times, but the law takes all tokens as fresh (Muennighoff "
                f'et al. 2023): fit with --form repeats, or exclude them: --where "tokens / unique_tokens < '
                f'{MANY_EPOCHS:g}"'
            )
    for name, one in found.items():
        if "refused" in one.result and (name != "a1" or options.approach != "all"):
            warnings.append(f"{name} is refused: {one.result['refused']}")
        warnings += _unused_budgets(name, one.result.get("budgets", ()))
        search = one.result.get("search")
        if search and search["condition_number"] > CONDITION:
            warnings.append(
                f"{name}: condition number {search['condition_number']:.3g}: vary D/N more, or the largest N"
            )
        if search and search["converged_starts"] < CONVERGED:
            warnings.append(f"{name}: only {search['converged_starts']:.0%} of the starts reached the minimum")
    return warnings
