"""A forecast of one run from a law: its held-out loss, its loss curve with a band, accuracies of tasks.

The curve comes from the sweep that the law was fitted to. Each of its runs, as a trunk and its branch, gives the ratio
of its training loss to the law's loss at its end, averaged over 40 equal shares of its tokens: runs of one schedule
nearly collapse so, whatever their size (Qiu et al. 2025). For each share a line in ln N and ln D/N predicts the run's
ratio, with the line's own prediction interval; the law's interval is added in quadrature.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bigtrain.scaling import law as formula
from bigtrain.scaling.document import finite, read_law
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.predict import predict
from bigtrain.scaling.runs.readers import SWEEP_RUNS, SWEEP_TRIALS
from bigtrain.storage import hash_file, read_lines
from bigtrain.tracking.forecast import BINS, KIND
from bigtrain.tracking.metrics import read_run_metrics

FORMAT_VERSION = 1
LEVEL = 0.99
"""Of the band at one share: two averages in succession outside it are the alarm."""
MIN_CURVES = 6
MAX_SPARSE = 2.0
"""Shares that one logged interval of a sweep's run may cover."""


def make_forecast(
    law_path: Path, params: float, tokens: float, steps: int, tasks: list[dict[str, Any]]
) -> dict[str, Any]:
    """What a law predicts of a run of N parameters on D tokens in so many steps.

    Raises:
        UserError: A law without a loss away from the optimum.
    """
    file = law_path / "law.json" if law_path.is_dir() else law_path
    law = read_law(law_path)
    said = predict(law, None, params, tokens)
    loss = said["chosen"]["loss"]
    curve, note = _curve(law, params, tokens, loss)
    return dict(finite({
        "kind": KIND, "format_version": FORMAT_VERSION, "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "law": str(file), "law_hash": hash_file(file), "params": params, "tokens": tokens, "steps": steps,
        "flops": said["flops"],
        "times_largest_run": said["times_largest_run"], "loss": loss, "curve": curve, "curve_source": note,
        "tasks": tasks, "warnings": law["warnings"],
    }))  # fmt: skip


def _curve(
    law: dict[str, Any], params: float, tokens: float, loss: dict[str, Any]
) -> tuple[list[dict[str, float]], str]:
    """Loss and band for each share of the run's tokens, or none and why."""
    sweep = Path(law["source"]["name"])
    if not (sweep / SWEEP_RUNS).exists():
        return [], "no curve: the law was not fitted to a sweep, whose runs have one"
    theta = np.array(law["approaches"][law["primary"]]["theta"])
    rows = list(read_lines(sweep / SWEEP_RUNS))
    known = [(row, found) for row in rows if (found := _ratios(sweep, row, rows, theta)) is not None]
    if len(known) < MIN_CURVES:
        return [], f"no curve: {len(known)} runs of the sweep have one, {MIN_CURVES} are needed"
    design = np.array([[1.0, math.log(row["params"]), math.log(row["tokens"] / row["params"])] for row, _ in known])
    middle = design.mean(axis=0) * np.array([0.0, 1.0, 1.0])
    design = design - middle
    at = np.array([1.0, math.log(params), math.log(tokens / params)]) - middle
    ratios = np.array([found for _, found in known])
    below, above = (abs(math.log(end / loss["value"])) for end in loss["interval"])
    curve = []
    for number in range(BINS):
        column = ratios[:, number]
        used = np.isfinite(column)
        if used.sum() < MIN_CURVES:
            continue
        centre, half = _predicted(design[used], column[used], at)
        value = loss["value"] * math.exp(centre)
        curve.append({
            "from": number / BINS, "to": (number + 1) / BINS, "loss": value,
            "low": value * math.exp(-math.hypot(half, below)), "high": value * math.exp(math.hypot(half, above)),
        })  # fmt: skip
    if not curve:
        return [], f"no curve: the runs of {sweep.name} are logged too rarely: see tracking.every"
    return curve, f"curves of {len(known)} runs of {sweep.name}"


def _predicted(design: FloatArray, column: FloatArray, at: FloatArray) -> tuple[float, float]:
    """A line's value at a point, and half of its prediction interval."""
    inverse = np.linalg.pinv(design.T @ design)
    beta = inverse @ design.T @ column
    dof = max(len(column) - np.linalg.matrix_rank(design), 1)
    rest = column - design @ beta
    variance = float(rest @ rest) / dof * (1 + float(at @ inverse @ at))
    return float(at @ beta), float(stats.t.ppf((1 + LEVEL) / 2, dof)) * math.sqrt(variance)


def _ratios(sweep: Path, row: dict[str, Any], rows: list[dict[str, Any]], theta: FloatArray) -> FloatArray | None:
    """ln of a run's training loss over the law's loss at its end, by shares of its tokens; NaN where none is logged."""
    logged = _whole_curve(sweep, row)
    end = float(row["tokens"])
    if not logged:
        return None
    tokens, sums = [0.0], [0.0]
    for one in logged:
        if one.get("loss") is not None and float(one["tokens"]) > tokens[-1]:
            sums.append(sums[-1] + float(one["loss"]) * (float(one["tokens"]) - tokens[-1]))
            tokens.append(float(one["tokens"]))
    # Logged intervals and shares have other ends: the sum up to each share's end is interpolated.
    ends = np.interp(np.linspace(0, end, BINS + 1), tokens, sums)
    means = np.diff(ends) / (end / BINS)
    shares = (np.arange(BINS) + 0.5) * end / BINS
    after = np.minimum(np.searchsorted(tokens, shares), len(tokens) - 1)
    wide = np.array(tokens)[after] - np.array(tokens)[np.maximum(after - 1, 0)]
    # An interval that is longer than a few shares hides how the loss falls inside it.
    means[(wide > MAX_SPARSE * end / BINS) | (shares > tokens[-1])] = np.nan
    return np.asarray(np.log(means / formula.loss(theta, row["params"], end)), dtype=np.float64)


def _whole_curve(sweep: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The logged objects of a run: its trunk's up to where it leaves, then its own."""
    own = read_run_metrics(sweep / SWEEP_TRIALS / str(row["run"]))
    if not row.get("parent"):
        return own
    trunk = read_run_metrics(sweep / SWEEP_TRIALS / str(row["parent"]))
    return [one for one in trunk if one["step"] <= int(row["parent_step"])] + [
        one for one in own if one["step"] > int(row["parent_step"])
    ]
