"""`bigtrain scaling fit`: one table of runs, three approaches, one law with intervals and what to think of it."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy

import bigtrain
from bigtrain.config import UserError
from bigtrain.scaling import diagnostics, envelope, isoflop, law, lines, parametric
from bigtrain.scaling.bootstrap import MIN_CLUSTERS, REPLICATES, bootstrap, interval
from bigtrain.scaling.columns import ColumnNames
from bigtrain.scaling.document import FORMAT_VERSION, KIND, finite, pack
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN, FloatArray
from bigtrain.scaling.objective import DEFAULT_DELTA, LOSS_FUNCTIONS, LossFunction, Problem
from bigtrain.scaling.readers import read_source
from bigtrain.scaling.table import RunTable, check, refuse_collinear
from bigtrain.scaling.where import where as select
from bigtrain.storage import hash_file

Approach = Literal["a1", "a2", "a3", "all"]
CHECK_REPLICATES = 250
DEFAULT_TARGET = 10.0
"""Times the largest run's FLOPs."""
FLOPS_DRIFT = 1.15
"""Factor over which C / 6 N D may vary before it is said."""


@dataclass(frozen=True)
class FitOptions:
    """What `bigtrain scaling fit` can be asked for."""

    columns: ColumnNames = field(default_factory=ColumnNames)
    drop_highest: int = 0
    where: str | None = None
    approach: Approach = "all"
    loss_function: LossFunction | None = None
    """None: all three, Huber first."""
    delta: float = DEFAULT_DELTA
    cluster: Literal["model", "none"] = "model"
    target_flops: float | None = None
    """None: ten times the largest run's."""
    equal_exponents: bool = False
    replicates: int = REPLICATES
    seed: int = 0
    processes: int | None = None

    @property
    def functions(self) -> tuple[LossFunction, ...]:
        """Those of approach 3, the chosen one first."""
        if self.loss_function is not None:
            return (self.loss_function,)
        return LOSS_FUNCTIONS if self.approach == "all" else ("huber",)


@dataclass(frozen=True)
class Fitted:
    """A law and the runs that it was fitted to."""

    law: dict[str, Any]
    """The content of law.json."""
    table: RunTable


def fit(source: str, options: FitOptions | None = None) -> Fitted:
    """Read runs, refuse what cannot be fitted, fit the law by each approach asked for.

    Raises:
        UserError: Bad input, or a single approach asked for that these runs do not allow. With approach "all" such an
            approach is reported as refused; it is an error only where none is left.
    """
    options = options or FitOptions()
    read = read_source(source, options.columns)
    table = select(read, options.where) if options.where else read
    if options.drop_highest:
        table = table.drop_highest(options.drop_highest)
    check(table)
    table = table.ordered()
    target = _target(table, options)
    clusters = table.clusters(options.cluster)
    found = _approaches(table, clusters, target, options)
    names = [name for name, one in found.items() if "refused" not in one.result]
    if not names:
        reasons = "; ".join(f"{name}: {one.result['refused']}" for name, one in found.items())
        raise UserError(f"No approach fits these runs. {reasons}", source)
    warnings = _warnings(table, clusters, found, options)
    primary = next((name for name in names if name.startswith("a3")), names[0])
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "kind": KIND, "primary": primary, "target_flops": target,
        "approaches": {name: one.result for name, one in found.items()},
        "agreement": _agreement(found, target), "held_out": None, "diagnostics": None, "warnings": warnings,
        "source": _source(read, table, options), "data": _data(table, clusters),
        "options": {**asdict(options), "processes": None}, "seed": options.seed,
        "versions": {
            "bigtrain": bigtrain.__version__, "python": platform.python_version(), "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
    }  # fmt: skip
    main = found[primary]
    if main.fitted is not None:
        _judge(document, table, clusters, main.fitted, options)
    return Fitted(finite(document), table)


@dataclass(frozen=True)
class _Result:
    """One approach: its part of law.json, and its replicates of (N*, D*) at the target."""

    result: dict[str, Any]
    exponent: FloatArray | None = None
    """Shape (R,)."""
    ln_params: FloatArray | None = None
    """ln N* at the target, shape (R,)."""
    fitted: parametric.ParametricFit | None = None


def _target(table: RunTable, options: FitOptions) -> float:
    largest = float(table.flops.max())
    if options.target_flops is None:
        return DEFAULT_TARGET * largest
    if not math.isfinite(options.target_flops) or options.target_flops <= largest:
        raise UserError(
            f"The target of {options.target_flops:.4g} FLOPs lies inside the data, which reaches {largest:.4g}: no law "
            "is needed there", "--target-flops", f"give more than {largest:.4g}, or leave it out: ten times that",
        )  # fmt: skip
    return options.target_flops


def _approaches(
    table: RunTable, clusters: npt.NDArray[np.int64], target: float, options: FitOptions
) -> dict[str, _Result]:
    found: dict[str, _Result] = {}
    for name, one in (("a1", _envelope), ("a2", _isoflop)):
        if options.approach in (name, "all"):
            try:
                found[name] = one(table, clusters, target, options)
            except UserError as error:
                if options.approach != "all":
                    raise
                found[name] = _Result({"refused": error.what, "fix": error.fix})
    if options.approach in ("a3", "all"):
        for function in options.functions:
            try:
                found[f"a3_{function}"] = _parametric(table, clusters, target, options, function)
            except UserError as error:
                # A design that refuses the law refuses it for every function; the others may still serve.
                if options.approach == "a3" or options.loss_function is not None or len(found) < 1:
                    raise
                found[f"a3_{function}"] = _Result({"refused": error.what, "fix": error.fix})
    return found


def _envelope(table: RunTable, clusters: npt.NDArray[np.int64], target: float, options: FitOptions) -> _Result:
    one = envelope.fit(table, clusters, options.seed, options.replicates)
    details = {
        "hull_points": len(one.rows), "hull_models": len({table.group[i] for i in one.rows}),
        "hull": [{"flops": table.flops[i], "params": table.params[i], "tokens": table.tokens[i],
                  "loss": table.loss[i]} for i in one.rows],
    }  # fmt: skip
    return _line_result(one.lines, one.replicates, target, details)


def _isoflop(table: RunTable, clusters: npt.NDArray[np.int64], target: float, options: FitOptions) -> _Result:
    one = isoflop.fit(table, clusters, options.seed, options.replicates)
    details = {
        "budgets": [
            {"flops": b.flops, "runs": len(b.rows), "params": b.params, "tokens": b.tokens, "loss": b.loss,
             "parabola_in_ln_tokens": list(b.parabola), "refused": b.refused or None}
            for b in one.budgets
        ]
    }  # fmt: skip
    return _line_result(one.lines, one.replicates, target, details)


def _line_result(found: lines.Lines, replicates: FloatArray, target: float, details: dict[str, Any]) -> _Result:
    own = found.as_array()
    params, tokens = lines.params_at(replicates, target), lines.tokens_at(replicates, target)
    names = ("a", "ln_params_at_1_flop", "b", "ln_tokens_at_1_flop")
    values = dict(zip(names, own.tolist(), strict=True))
    result = {
        **values,
        "params_coefficient": math.exp(found.params_intercept), "tokens_coefficient": math.exp(found.tokens_intercept),
        "interval": {name: interval(replicates[:, i]) for i, name in enumerate(names)},
        "standard_error": {name: _deviation(replicates[:, i]) for i, name in enumerate(names)},
        "target": {
            "flops": target,
            "params": _with_interval(float(lines.params_at(own, target)), params),
            "tokens": _with_interval(float(lines.tokens_at(own, target)), tokens),
            "tokens_per_param": _with_interval(
                float(lines.tokens_at(own, target) / lines.params_at(own, target)), tokens / params
            ),
        },
        "replicates_used": float(np.isfinite(replicates).all(axis=1).mean()), **details, "replicates": pack(replicates),
    }  # fmt: skip
    return _Result(result, replicates[:, 0], np.log(params))


def _parametric(
    table: RunTable, clusters: npt.NDArray[np.int64], target: float, options: FitOptions, function: LossFunction
) -> _Result:
    problem = Problem.of(
        table.params, table.tokens, table.loss, function, options.delta, options.equal_exponents
    )  # fmt: skip
    refuse_collinear(table, problem.basis.shape[1])
    fitted = parametric.fit(problem, options.seed)
    _refuse_no_optimum(fitted.theta, target, table.source)
    # The functions beside the chosen one are a check: fewer replicates show whether they agree.
    count = options.replicates if function == options.functions[0] else min(options.replicates, CHECK_REPLICATES)
    refits = bootstrap(problem, fitted.centred, clusters, options.seed, count, options.processes)
    own, many = law.natural(fitted.theta), law.natural(refits.theta)
    a = law.exponent(refits.theta)
    result: dict[str, Any] = {
        **dict(zip(law.NAMES, own.tolist(), strict=True)), "a": float(law.exponent(fitted.theta)),
        "b": 1 - float(law.exponent(fitted.theta)), "objective": fitted.objective,
        "loss_function": function, "delta": options.delta if function == "huber" else None,
        "interval": {**{name: interval(many[:, i]) for i, name in enumerate(law.NAMES)}, "a": interval(a)},
        "standard_error": {**{name: _deviation(many[:, i]) for i, name in enumerate(law.NAMES)}, "a": _deviation(a)},
        "target": _at_target(fitted.theta, refits.theta, target),
        "noise": diagnostics.noise(fitted.residuals),
        "search": {
            "starts": fitted.starts, "converged_starts": fitted.converged_starts,
            "projection_objective": fitted.projection_objective, "condition_number": fitted.condition_number,
            "refits_converged": refits.converged, "refits_agreed": refits.agreed,
        },
        "theta": fitted.theta.tolist(), "replicates": pack(refits.theta),
    }  # fmt: skip
    ln_params = np.log(law.optimal_params(refits.theta, target))
    return _Result(result, a, ln_params, fitted)


def _refuse_no_optimum(theta: FloatArray, target: float, source: str) -> None:
    """Refuse a law in which N or D does not count: runs too short, or too alike, for the losses to show it."""
    best = {"parameters": float(law.optimal_params(theta, target)), "tokens": float(law.optimal_tokens(theta, target))}
    missing = next((name for name, value in best.items() if not value >= 1.0), None)
    if missing is not None:
        raise UserError(
            f"The losses do not show what more {missing} are good for: the best number of them for {target:.3g} FLOPs "
            f"would be {best[missing]:.1g}", source, "train longer, and sizes further apart",
        )  # fmt: skip


def _at_target(theta: FloatArray, many: FloatArray, flops: float) -> dict[str, Any]:
    quantities = {
        "params": law.optimal_params, "tokens": law.optimal_tokens, "loss": law.optimal_loss,
        "tokens_per_param": lambda at, c: law.optimal_tokens(at, c) / law.optimal_params(at, c),
    }  # fmt: skip
    return {
        "flops": flops,
        **{name: _with_interval(float(one(theta, flops)), one(many, flops)) for name, one in quantities.items()},
    }


def _with_interval(value: float, replicates: FloatArray) -> dict[str, Any]:
    return {"value": value, "interval": interval(replicates), "interval_80": interval(replicates, 0.8)}


def _deviation(values: FloatArray) -> float:
    known = values[np.isfinite(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else float("nan")


def _agreement(found: dict[str, _Result], target: float) -> dict[str, Any]:
    """Whether two approaches differ by more than their paired replicates do, in a and in N* at the target."""
    known = {name: one for name, one in found.items() if one.exponent is not None and name in _COMPARED}
    pairs = []
    names = list(known)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            one, other = known[first], known[second]
            assert one.exponent is not None
            assert other.exponent is not None
            assert one.ln_params is not None
            assert other.ln_params is not None
            paired = min(len(one.exponent), len(other.exponent))
            difference = interval(one.exponent[:paired] - other.exponent[:paired])
            ratio = [math.exp(v) for v in interval(one.ln_params[:paired] - other.ln_params[:paired])]
            agree = difference[0] <= 0 <= difference[1] and ratio[0] <= 1 <= ratio[1]
            pairs.append({
                "first": first, "second": second, "exponent_difference": one.result["a"] - other.result["a"],
                "exponent_difference_interval": difference,
                "params_ratio_at_target": one.result["target"]["params"]["value"]
                / other.result["target"]["params"]["value"],
                "params_ratio_interval": ratio, "agree": agree,
            })  # fmt: skip
    return {"agree": all(pair["agree"] for pair in pairs) if pairs else None, "pairs": pairs}


_COMPARED = ("a1", "a2", "a3_huber", "a3_l1", "a3_squares")


def _judge(
    document: dict[str, Any], table: RunTable, clusters: npt.NDArray[np.int64], fitted: parametric.ParametricFit,
    options: FitOptions,
) -> None:  # fmt: skip
    """Add the headline error and the diagnostics of the primary fit."""
    target, warnings = document["target_flops"], document["warnings"]
    judged = diagnostics.held_out(table, fitted.problem, clusters, options.seed, min(options.replicates, 300))
    if isinstance(judged, str):
        document["held_out"] = {"refused": judged}
        warnings.append(f"nothing could be held out: {judged}")
    else:
        document["held_out"] = {
            **asdict(judged), "run": table.run[judged.row], "params": table.params[judged.row],
            "tokens": table.tokens[judged.row], "flops": table.flops[judged.row],
        }  # fmt: skip
    changes = diagnostics.influence(fitted, clusters, target)
    order = np.argsort(-np.abs(changes))
    members = [np.flatnonzero(clusters == c)[0] for c in range(len(changes))]
    far = diagnostics.outliers(table, fitted, target)
    slopes = diagnostics.trends(table, fitted.residuals)
    document["diagnostics"] = {
        "delta_sensitivity": diagnostics.delta_sensitivity(fitted, target),
        "influence": [
            {"name": table.group[members[c]] if options.cluster == "model" else table.run[members[c]],
             "target_loss_change": changes[c]}
            for c in order
        ],
        "outliers": far, "residual_trends": slopes,
        "equal_exponents": _equal_exponents(fitted, options.seed, target),
    }  # fmt: skip
    if far["runs"]:
        moved = far["without"]["target_loss"] - float(law.optimal_loss(fitted.theta, target))
        warnings.append(
            f"{len(far['runs'])} outliers ({far['rule']}); without them the loss at the target changes by {moved:+.4f}"
        )
    for name, slope in slopes.items():
        if abs(slope["standard_errors"]) > diagnostics.TREND:
            warnings.append(
                f"residuals go with {name}: {slope['slope']:+.2e} of the loss per e-fold "
                f"({abs(slope['standard_errors']):.1f} standard errors): the law's form misses something"
            )


def _equal_exponents(fitted: parametric.ParametricFit, seed: int, target: float) -> dict[str, Any]:
    problem = fitted.problem
    joined = Problem(
        problem.ln_n, problem.ln_d, problem.ln_loss, problem.center, problem.function, problem.delta, True
    )  # fmt: skip
    other = parametric.fit(joined, seed, starts=8)
    return {
        **dict(zip(law.NAMES, law.natural(other.theta).tolist(), strict=True)), "objective": other.objective,
        "target_loss": float(law.optimal_loss(other.theta, target)),
    }  # fmt: skip


def _warnings(
    table: RunTable, clusters: npt.NDArray[np.int64], found: dict[str, _Result], options: FitOptions
) -> list[str]:
    warnings = []
    count = int(clusters.max()) + 1
    if count < MIN_CLUSTERS:
        warnings.append(
            f"{count} clusters ({options.cluster}): with fewer than {MIN_CLUSTERS} the intervals are too narrow"
        )
    share = table.flops / (FLOPS_PER_PARAMETER_TOKEN * table.params * table.tokens)
    if table.flops_exact and share.max() > FLOPS_DRIFT * share.min():
        warnings.append(
            f"exact FLOPs are {share.min():.2f} to {share.max():.2f} times 6 N D: N* and D* of approach 3 take 6 N D, "
            "approaches 1 and 2 the exact ones"
        )
    for name, one in found.items():
        if "refused" in one.result:
            warnings.append(f"{name} is refused: {one.result['refused']}")
        for budget in one.result.get("budgets", ()):
            if budget["refused"]:
                warnings.append(f"{name}: the budget of {budget['flops']:.3g} FLOPs is left out: {budget['refused']}")
        search = one.result.get("search")
        if search and search["condition_number"] > CONDITION:
            warnings.append(
                f"{name}: condition number {search['condition_number']:.3g}: vary D/N more, or the largest N"
            )
        if search and search["converged_starts"] < CONVERGED:
            warnings.append(f"{name}: only {search['converged_starts']:.0%} of the starts reached the minimum")
    return warnings


CONDITION, CONVERGED = 1e3, 0.25
"""Beyond which a parametric fit is warned of: condition number, and the share of starts that reached the minimum."""


def _source(read: RunTable, used: RunTable, options: FitOptions) -> dict[str, Any]:
    path = Path(read.source)
    return {
        "name": read.source, "file_hash": hash_file(path) if path.is_file() else None, "data_hash": used.digest(),
        "rows_read": len(read), "rows_used": len(used), "where": options.where, "drop_highest": options.drop_highest,
        "notes": list(read.notes),
    }  # fmt: skip


def _data(table: RunTable, clusters: npt.NDArray[np.int64]) -> dict[str, Any]:
    ratio = table.tokens / table.params

    def span(values: FloatArray) -> list[float]:
        return [float(values.min()), float(values.max())]

    return {
        "runs": len(table), "models": len(set(table.group)), "clusters": int(clusters.max()) + 1,
        "params": span(table.params), "tokens": span(table.tokens), "flops": span(table.flops),
        "loss": span(table.loss), "tokens_per_param": span(ratio),
        "flops_over_6nd": span(table.flops / (FLOPS_PER_PARAMETER_TOKEN * table.params * table.tokens)),
        "phase": next(iter(table.phase), None) or None,
    }  # fmt: skip
