"""`bigtrain scaling predict`: a law's loss and allocation at a budget, with intervals, and the most useful next run.

It needs neither SciPy nor torch, so that a law can be used where they are not installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.scaling import law, lines
from bigtrain.scaling.document import finite, unpack
from bigtrain.scaling.forms import Form
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN, FloatArray
from bigtrain.scaling.misfit import widened

LEVELS = {"interval": 0.95, "interval_80": 0.8}
MISMATCH = 0.05
"""Largest relative difference between C and 6 N D if all three are given."""
NORMAL = {"interval": 1.96, "interval_80": 1.2816}
_CANDIDATES = 40
_LARGEST_SHARE = 0.05
"""Least cost of a proposed run, as a fraction of the largest run's FLOPs; laws fit cheaper runs less well."""
_RATIO = 8.0
"""Largest factor between the D/N of a proposed run and the optimal D/N, as far as the measured runs cover it."""
_LONGEST = 2.0
"""Largest N and D of a proposed run, relative to the largest N and D of the measured runs."""


def predict(
    document: dict[str, Any], flops: float | None = None, params: float | None = None, tokens: float | None = None
) -> dict[str, Any]:
    """Predict the optimal N and D for C FLOPs and the loss there, and the loss at another N or D.

    Args:
        document: The content of law.json; see `document.read_law`.
        flops: C; None: 6 N D of `params` and `tokens` if both are given, otherwise the law's target.
        params: N of a run away from the optimum; None: it follows from `tokens` by C = 6 N D.
        tokens: D of a run away from the optimum; None: it follows from `params` by C = 6 N D.

    Returns:
        Plain values for JSON: `optimal`, `chosen` if `params` or `tokens` is given, `next_run`, and facts about the
        law.

    Raises:
        UserError: A value is not a positive number, C is not near 6 N D, or the law has no loss away from its optimum.
    """
    for name, value in (("flops", flops), ("params", params), ("tokens", tokens)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise UserError(f"--{name} must be a positive number, not {value}", "command line")
    if flops is None:
        both = params is not None and tokens is not None
        flops = FLOPS_PER_PARAMETER_TOKEN * params * tokens if both else document["target_flops"]  # type: ignore[operator]
    approach = document["approaches"][document["primary"]]
    replicates = unpack(approach["replicates"])
    result: dict[str, Any] = {
        "flops": flops, "approach": document["primary"], "inside_the_data": flops <= document["data"]["flops"][1],
        "times_largest_run": flops / document["data"]["flops"][1], "warnings": document["warnings"],
        "misfit": document.get("misfit"),
    }  # fmt: skip
    if document["primary"] == "form":
        unique = approach["unique_tokens"] or math.inf
        form = Form.parse(approach["expression"])
        return _by_form(
            document, result, form, np.array([approach["ln_constants"], *replicates]), unique, params, tokens
        )
    if not document["primary"].startswith("a3"):
        if params is not None or tokens is not None:
            raise UserError(
                f"This law ({document['primary']}) predicts only N* and D*, not the loss at other N and D",
                "--params, --tokens", "Fit with --approach a3.",
            )  # fmt: skip
        own = np.array([approach[k] for k in ("a", "ln_params_at_1_flop", "b", "ln_tokens_at_1_flop")])
        n, d = lines.params_at(own, flops), lines.tokens_at(own, flops)
        many_n, many_d = lines.params_at(replicates, flops), lines.tokens_at(replicates, flops)
        result["optimal"] = {
            "params": _with_intervals(n, many_n), "tokens": _with_intervals(d, many_d),
            "tokens_per_param": _with_intervals(d / n, many_d / many_n),
        }  # fmt: skip
        return dict(finite(result))
    theta = np.array(approach["theta"])
    result["optimal"] = _optimal(theta, replicates, flops)
    if params is not None or tokens is not None:
        result["chosen"] = _chosen(theta, replicates, flops, params, tokens)
    result["next_run"] = next_run(document, theta, replicates, flops)
    _add_misfit(document, result)
    return dict(finite(result))


def loss_function(document: dict[str, Any]) -> Callable[[float, float], float]:
    """A function that returns the loss of the primary fit at (N, D).

    For a form of the user's own with U, U is the largest number of unique tokens of the fitted runs.

    Raises:
        UserError: The law was fitted by approach 1 or 2, which gives only N* and D*.
    """
    one = document["approaches"][document["primary"]]
    if document["primary"] == "form":
        form, logs, unique = Form.parse(one["expression"]), np.array(one["ln_constants"]), one["unique_tokens"]
        return lambda n, d: float(form.loss(logs, [n], [d], unique or math.inf)[0, 0])
    if not document["primary"].startswith("a3"):
        raise UserError(f"This law ({document['primary']}) has no loss", "law.json", "Fit with --approach a3.")
    theta = np.array(one["theta"])
    return lambda n, d: float(law.loss(theta, n, d))


def _by_form(
    document: dict[str, Any], result: dict[str, Any], form: Form, logs: FloatArray, unique: float,
    params: float | None, tokens: float | None,
) -> dict[str, Any]:  # fmt: skip
    """The prediction of the user's own form; the first row of `logs` is the fit, the others are the replicates."""
    flops = result["flops"]
    n, d, loss = form.optimum(logs, flops, unique)
    if not np.isfinite(n[0]):
        raise UserError(
            f"By {form.text} no N is best at {flops:.4g} FLOPs",
            "--flops",
            "Give --params and --tokens to get the loss there.",
        )
    result["optimal"] = {
        name: _with_intervals(values[0], values[1:])
        for name, values in (("params", n), ("tokens", d), ("tokens_per_param", d / n), ("loss", loss))
    }
    if params is not None or tokens is not None:
        n_at, d_at = _pair(flops, params, tokens)
        reached = form.loss(logs, [n_at], [d_at], unique)[:, 0]
        result["chosen"] = {
            "params": n_at, "tokens": d_at, "tokens_per_param": d_at / n_at,
            "loss": _with_intervals(reached[0], reached[1:]),
            "excess_loss": _with_intervals((reached - loss)[0], (reached - loss)[1:]), "flops_price": None,
        }  # fmt: skip
    result["next_run"] = None
    _add_misfit(document, result)
    return dict(finite(result))


def _pair(flops: float, params: float | None, tokens: float | None) -> tuple[float, float]:
    """N and D of a run of C FLOPs, of which at least one is given.

    Raises:
        UserError: Both are given, and 6 N D is not near C.
    """
    k = FLOPS_PER_PARAMETER_TOKEN
    n = params if params is not None else flops / (k * (tokens or 1.0))
    d = tokens if tokens is not None else flops / (k * n)
    if abs(k * n * d / flops - 1) > MISMATCH:
        raise UserError(
            f"{n:.4g} parameters on {d:.4g} tokens are {k * n * d:.4g} FLOPs (6 N D), not {flops:.4g}", "command line",
            "Give only one of --params and --tokens: the other follows.",
        )  # fmt: skip
    return n, d


def _add_misfit(document: dict[str, Any], result: dict[str, Any]) -> None:
    """Widen the intervals of losses by the misfit of the back-tests."""
    misfit = document.get("misfit") or {"rate": 0.0, "largest_flops": document["data"]["flops"][1]}
    efolds = math.log(result["flops"] / misfit["largest_flops"])
    for part in ("optimal", "chosen"):
        if loss := result.get(part, {}).get("loss"):
            loss["interval_of_parameters"] = loss["interval"]
            for name, normal in NORMAL.items():
                loss[name] = widened(loss["value"], loss[name], misfit["rate"], efolds, normal)


def _optimal(theta: FloatArray, replicates: FloatArray, flops: float) -> dict[str, Any]:
    n, many_n = law.optimal_params(theta, flops), law.optimal_params(replicates, flops)
    d, many_d = law.optimal_tokens(theta, flops), law.optimal_tokens(replicates, flops)
    return {
        "params": _with_intervals(n, many_n), "tokens": _with_intervals(d, many_d),
        "tokens_per_param": _with_intervals(d / n, many_d / many_n),
        "loss": _with_intervals(law.optimal_loss(theta, flops), law.optimal_loss(replicates, flops)),
    }  # fmt: skip


def _chosen(
    theta: FloatArray, replicates: FloatArray, flops: float, params: float | None, tokens: float | None
) -> dict[str, Any]:
    """The loss at N and D away from the optimum, and its price.

    The price is the ratio of its FLOPs to the FLOPs that reach the same loss at the optimum.
    """
    n, d = _pair(flops, params, tokens)
    reached, many = law.loss(theta, n, d), law.loss(replicates, n, d)
    excess = reached - law.optimal_loss(theta, flops)
    many_excess = many - law.optimal_loss(replicates, flops)
    price = flops / _equal_budget(theta[None], np.array([reached]), flops)[0]
    many_price = flops / _equal_budget(replicates, many, flops)
    return {
        "params": n, "tokens": d, "tokens_per_param": d / n, "loss": _with_intervals(reached, many),
        "excess_loss": _with_intervals(excess, many_excess), "flops_price": _with_intervals(price, many_price),
    }  # fmt: skip


def _equal_budget(theta: FloatArray, losses: FloatArray, flops: float) -> FloatArray:
    """The FLOPs whose optimum has each loss, shape (R,).

    By Hoffmann et al. 2022, eq. 4, the loss at the optimum minus E is a power of C.
    """
    fall = theta[:, 3] * theta[:, 4] / (theta[:, 3] + theta[:, 4])
    floor = np.exp(theta[:, 2])
    above = law.optimal_loss(theta, flops) - floor
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(flops * ((losses - floor) / above) ** (-1 / fall), dtype=np.float64)


def next_run(document: dict[str, Any], theta: FloatArray, replicates: FloatArray, flops: float) -> dict[str, Any]:
    """The next run that would make the interval of the loss at C FLOPs narrowest.

    It costs at most as much as the largest run so far. The covariance, over the replicates, of ln L at a candidate with
    ln L* at C gives the variance that would remain after the candidate is measured with the noise of one run. This is
    a linear update, as in Bayesian experimental design.

    The N and D of a candidate lie between the smallest and twice the largest of the measured runs, its D/N within
    their range, and its FLOPs are at least a twentieth of the largest run's. Replicates beyond the 2.5 % and 97.5 %
    quantiles are clipped to these.

    Args:
        document: The content of law.json.
        theta: Parameters of the law, shape (5,).
        replicates: Parameters of the bootstrap replicates, shape (R, 5).
        flops: C.
    """
    data = document["data"]
    noise = float(document["approaches"][document["primary"]]["noise"])
    n = np.geomspace(data["params"][0], data["params"][1] * _LONGEST, _CANDIDATES)
    best = float(law.optimal_tokens(theta, flops) / law.optimal_params(theta, flops))
    low, high = (float(end) for end in data["tokens_per_param"])
    low, high = max(low, min(best / _RATIO, high)), min(high, max(best * _RATIO, low))
    ratio = np.geomspace(low, high, _CANDIDATES)
    grid_n = np.repeat(n, len(ratio))
    grid_d = grid_n * np.tile(ratio, len(n))
    cost = FLOPS_PER_PARAMETER_TOKEN * grid_n * grid_d
    largest = min(data["flops"][1], FLOPS_PER_PARAMETER_TOKEN * data["params"][1] * data["tokens"][1])
    allowed = (cost <= largest * (1 + 1e-9)) & (cost >= _LARGEST_SHARE * largest)
    allowed &= (grid_d >= data["tokens"][0]) & (grid_d <= data["tokens"][1] * _LONGEST)
    if not allowed.any():
        allowed = cost <= max(largest, float(cost.min()))
    grid_n, grid_d = grid_n[allowed], grid_d[allowed]
    seen = _clipped(np.log(law.loss(replicates[:, None], grid_n, grid_d)))
    target = _clipped(np.log(law.optimal_loss(replicates, flops)))
    centred, wanted = seen - seen.mean(axis=0), target - target.mean()
    covariance = wanted @ centred / len(wanted)
    gain = covariance**2 / ((centred**2).mean(axis=0) + noise**2)
    best = int(np.argmax(gain))
    before = float(target.std())
    after = float(np.sqrt(max(before**2 - gain[best], 0.0)))
    return {
        "params": grid_n[best], "tokens": grid_d[best], "tokens_per_param": grid_d[best] / grid_n[best],
        "flops": FLOPS_PER_PARAMETER_TOKEN * grid_n[best] * grid_d[best],
        "expected_loss": float(law.loss(theta, grid_n[best], grid_d[best])),
        "interval_width_factor": after / before if before > 0 else 1.0,
    }  # fmt: skip


def _clipped(values: FloatArray) -> FloatArray:
    """Replicates of shape (R, ...), clipped to their 2.5 % and 97.5 % quantiles."""
    with np.errstate(invalid="ignore"):
        low, high = np.nanquantile(np.where(np.isfinite(values), values, np.nan), [0.025, 0.975], axis=0)
    return np.asarray(np.clip(values, low, high), dtype=np.float64)


def _with_intervals(value: Any, many: FloatArray) -> dict[str, Any]:
    known = many[np.isfinite(many)]
    spans = {
        name: [float(v) for v in np.quantile(known, [(1 - level) / 2, (1 + level) / 2])]
        for name, level in LEVELS.items()
    }
    return {"value": float(value), **spans}
