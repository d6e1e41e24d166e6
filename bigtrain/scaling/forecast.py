"""A forecast of one run from a law: its held-out loss, its loss curve with a band, and accuracies of tasks.

The curve comes from the sweep to which the law was fitted. Each run of the sweep is a trunk and its branch. Its
training loss, divided by the law's loss at the run's end, is averaged over 40 equal shares of its tokens. The resulting
curves of runs with one schedule are almost the same for all sizes (Qiu et al. 2025). For each share, a linear function
of ln N and ln D/N predicts the logarithm of the new run's ratio with a prediction interval, and the law's interval is
added in quadrature. The band has its level for all shares together (Bonferroni), because the shares of one run are
observed one after another.

The forecast of the held-out loss at the end has the interval of a single run, which is wider than that of the law. The
systematic part of the residuals near its (N, D) is added to the law's loss (see `discrepancy`). The uncertainty of that
part and the noise of one run are added to the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bigtrain.scaling.discrepancy import Discrepancy, discrepancy
from bigtrain.scaling.document import finite, read_law
from bigtrain.scaling.law import NAMES, FloatArray
from bigtrain.scaling.predict import loss_function, predict
from bigtrain.scaling.runs.readers import SWEEP_RUNS, SWEEP_TRIALS
from bigtrain.storage import hash_file, read_lines
from bigtrain.tracking.forecast import BINS, KIND, MAX_SPARSE
from bigtrain.tracking.metrics import read_run_metrics

FORMAT_VERSION = 1
LEVEL = 0.95
"""Level of the band for all shares together. A run has left it after two successive averages outside."""
LEVELS = {"interval": 0.95, "interval_80": 0.8}

MIN_CURVES = 6
NOISE_PARTS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Values to try for the fraction of a ratio's variance that is inversely proportional to the tokens of a share."""


def make_forecast(
    law_path: Path, params: float, tokens: float, steps: int, tasks: list[dict[str, Any]]
) -> dict[str, Any]:
    """The forecast of a law for one run, as plain values for JSON.

    Args:
        law_path: law.json, or the directory that holds it.
        params: N of the run, counted as the law counts it.
        tokens: D of the run.
        steps: Number of steps of the run.
        tasks: Predictions of task accuracies; see `decide.predict_tasks`.

    Raises:
        UserError: The law cannot be read, or gives no loss away from its optimum.
    """
    file = law_path / "law.json" if law_path.is_dir() else law_path
    law = read_law(law_path)
    predicted = predict(law, None, params, tokens)
    curve, note = _curve(law, params, tokens, predicted["chosen"]["loss"])
    loss = _of_one_run(law, params, tokens, predicted["chosen"]["loss"])
    return dict(finite({
        "kind": KIND, "format_version": FORMAT_VERSION, "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "law": str(file), "law_hash": hash_file(file), "params": params, "tokens": tokens, "steps": steps,
        "flops": predicted["flops"],
        "times_largest_run": predicted["times_largest_run"], "loss": loss, "curve": curve, "curve_source": note,
        "tasks": tasks, "warnings": list(law["warnings"]),
    }))  # fmt: skip


def _of_one_run(law: dict[str, Any], params: float, tokens: float, loss: dict[str, Any]) -> dict[str, Any]:
    """The predicted loss of one run, from the law's loss and its systematic error, with the noise of one run."""
    one = law["approaches"][law["primary"]]
    parameters = len(one.get("constants", NAMES))
    dof = max(law["data"]["runs"] - parameters, 1)
    known = law.get("residuals")
    if known is None:
        moved = Discrepancy(0.0, 0.0, float(one["noise"]) * math.sqrt(law["data"]["runs"] / dof))
    else:
        columns = [np.array(known[name]) for name in ("params", "tokens", "ln_measured_over_law")]
        moved = discrepancy(columns[0], columns[1], columns[2], (params, tokens), parameters)
    value = loss["value"] * math.exp(moved.mean)
    found = {**loss, "value": value, "law": loss["value"], "interval_of_law": loss["interval"],
             "discrepancy": asdict(moved)}  # fmt: skip
    for name, level in LEVELS.items():
        own = float(stats.t.ppf((1 + level) / 2, dof)) * math.hypot(moved.deviation, moved.noise)
        below, above = (abs(math.log(end / loss["value"])) for end in loss[name])
        found[name] = [value * math.exp(-math.hypot(below, own)), value * math.exp(math.hypot(above, own))]
    return found


def _curve(
    law: dict[str, Any], params: float, tokens: float, loss: dict[str, Any]
) -> tuple[list[dict[str, float]], str]:
    """The loss and its band for each share of the run's tokens, and a note on their source.

    If there is no curve, the list is empty and the note gives the reason.
    """
    sweep = Path(law["source"]["name"])
    if not (sweep / SWEEP_RUNS).exists():
        return [], "no curve: the law was not fitted to a sweep, whose runs have one"
    by_law = loss_function(law)
    rows = list(read_lines(sweep / SWEEP_RUNS))
    known = [(row, found) for row in rows if (found := _ratios(sweep, row, by_law)) is not None]
    if len(known) < MIN_CURVES:
        return [], f"no curve: {len(known)} runs of the sweep have one, {MIN_CURVES} are needed"
    design = np.array([[1.0, math.log(row["params"]), math.log(row["tokens"] / row["params"])] for row, _ in known])
    middle = design.mean(axis=0) * np.array([0.0, 1.0, 1.0])
    design = design - middle
    at = np.array([1.0, math.log(params), math.log(tokens / params)]) - middle
    ratios = np.array([found for _, found in known])
    below, above = (abs(math.log(end / loss["value"])) for end in loss["interval"])
    variances, own = _variances(design, ratios, np.array([float(row["tokens"]) for row, _ in known]), tokens)
    curve = []
    for number in range(BINS):
        column = ratios[:, number]
        used = np.isfinite(column)
        if used.sum() < MIN_CURVES:
            continue
        centre, half = _predicted(design[used], column[used], at, variances[used], own)
        value = loss["value"] * math.exp(centre)
        curve.append({
            "from": number / BINS, "to": (number + 1) / BINS, "loss": value,
            "low": value * math.exp(-math.hypot(half, below)), "high": value * math.exp(math.hypot(half, above)),
        })  # fmt: skip
    if not curve:
        return [], f"no curve: the runs of {sweep.name} are logged too rarely: see tracking.every"
    return curve, f"curves of {len(known)} runs of {sweep.name}"


def _predicted(
    design: FloatArray, column: FloatArray, at: FloatArray, variances: FloatArray, own: float
) -> tuple[float, float]:
    """The predicted log ratio of the new run in one share, and the half-width of its prediction interval.

    The interval has level `LEVEL` for all shares together.

    Args:
        design: Regressors of the sweep's runs, shape (n, 3).
        column: Log ratios of these runs, shape (n,).
        at: Regressors of the new run, shape (3,).
        variances: Relative variances of the log ratios, shape (n,).
        own: Relative variance of the new run's log ratio.
    """
    beta, inverse, variance, dof = _weighted(design, column, variances)
    half = math.sqrt(variance * (own + float(at @ inverse @ at)))
    return float(at @ beta), float(stats.t.ppf(1 - (1 - LEVEL) / (2 * BINS), dof)) * half


def _weighted(
    design: FloatArray, column: FloatArray, variances: FloatArray
) -> tuple[FloatArray, FloatArray, float, int]:
    """Weighted least squares.

    Returns:
        The coefficients, their covariance divided by the variance, the variance, and the degrees of freedom.
    """
    weighted = design / variances[:, None]
    inverse = np.asarray(np.linalg.pinv(design.T @ weighted), dtype=np.float64)
    beta = inverse @ weighted.T @ column
    dof = max(len(column) - int(np.linalg.matrix_rank(design)), 1)
    rest = column - design @ beta
    return beta, inverse, float((rest**2 / variances).sum()) / dof, dof


def _variances(design: FloatArray, ratios: FloatArray, tokens: FloatArray, own: float) -> tuple[FloatArray, float]:
    """Relative variances of the runs' log ratios, shape (n,), and of the new run's log ratio.

    A part of the variance is inversely proportional to the tokens of a share, the other part is the same for all runs.
    The first part's fraction is the value of `NOISE_PARTS` with the highest likelihood over all shares.

    Args:
        design: Regressors of the sweep's runs, shape (n, 3).
        ratios: Log ratios, shape (n, shares); NaN if not known.
        tokens: D of the runs, shape (n,).
        own: D of the new run.
    """
    middle = float(np.median(tokens))
    best: tuple[float, FloatArray, float] | None = None
    for part in NOISE_PARTS:
        variances = 1 - part + part * middle / tokens
        total = 0.0
        for column in ratios.T:
            used = np.isfinite(column)
            if used.sum() >= MIN_CURVES:
                _, _, variance, dof = _weighted(design[used], column[used], variances[used])
                total -= 0.5 * (dof * math.log(max(variance, 1e-30)) + float(np.log(variances[used]).sum()))
        if best is None or total > best[0]:
            best = total, variances, 1 - part + part * middle / own
    assert best is not None
    return best[1], best[2]


def _ratios(sweep: Path, row: dict[str, Any], by_law: Callable[[float, float], float]) -> FloatArray | None:
    """ln of the ratio of a run's training loss to the law's loss at its end, for each share of its tokens.

    The shape is (shares,), with NaN for a share that was logged too rarely. None if the run has no metrics.
    """
    logged = _whole_curve(sweep, row)
    end = float(row["tokens"])
    if not logged:
        return None
    tokens, sums = [0.0], [0.0]
    for one in logged:
        if one.get("loss") is not None and float(one["tokens"]) > tokens[-1]:
            sums.append(sums[-1] + float(one["loss"]) * (float(one["tokens"]) - tokens[-1]))
            tokens.append(float(one["tokens"]))
    # Logged intervals do not end where shares end, so the sum of losses at the end of each share is interpolated.
    ends = np.interp(np.linspace(0, end, BINS + 1), tokens, sums)
    means = np.diff(ends) / (end / BINS)
    shares = (np.arange(BINS) + 0.5) * end / BINS
    after = np.minimum(np.searchsorted(tokens, shares), len(tokens) - 1)
    wide = np.array(tokens)[after] - np.array(tokens)[np.maximum(after - 1, 0)]
    # A logged interval that covers several shares does not show how the loss falls within it.
    means[(wide > MAX_SPARSE * end / BINS) | (shares > tokens[-1])] = np.nan
    return np.asarray(np.log(means / by_law(float(row["params"]), end)), dtype=np.float64)


def _whole_curve(sweep: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The logged metrics of a run from step 0: those of its trunk up to the branch's first step, then its own."""
    own = read_run_metrics(sweep / SWEEP_TRIALS / str(row["run"]))
    if not row.get("parent"):
        return own
    trunk = read_run_metrics(sweep / SWEEP_TRIALS / str(row["parent"]))
    return [one for one in trunk if one["step"] <= int(row["parent_step"])] + [
        one for one in own if one["step"] > int(row["parent_step"])
    ]
