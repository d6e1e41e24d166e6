"""A forecast of one run from a law: its held-out loss, its loss curve with a band, and accuracies of tasks.

The curve comes from the sweep to which the law was fitted; see `curves`. The law's interval is added to the errors of
its shares in quadrature. The band has its level for all shares together (Bonferroni), because the shares of one run are
observed one after another.

The forecast of the held-out loss at the end has the interval of a single run, which is wider than that of the law. The
systematic part of the residuals near its (N, D) is added to the law's loss (see `discrepancy`). The uncertainty of that
part and the noise of one run are added to the interval.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bigtrain.scaling.curves import MIN_CURVES, curve_of, predict_curve, read_trunks, text_noise
from bigtrain.scaling.discrepancy import Discrepancy, discrepancy
from bigtrain.scaling.document import finite, read_law
from bigtrain.scaling.law import NAMES
from bigtrain.scaling.predict import loss_function, predict
from bigtrain.scaling.runs.readers import SWEEP_RUNS
from bigtrain.storage import hash_file, read_lines
from bigtrain.tracking.forecast import BINS, KIND

FORMAT_VERSION = 1
LEVEL = 0.95
"""Level of the band for all shares together. A run has left it after two successive averages outside."""
LEVELS = {"interval": 0.95, "interval_80": 0.8, "interval_99": 0.99}


def make_forecast(
    law_path: Path, params: float, tokens: float, steps: int, tasks: list[dict[str, Any]], seed: int | None = None
) -> dict[str, Any]:
    """The forecast of a law for one run, as plain values for JSON.

    Args:
        law_path: law.json, or the directory that holds it.
        params: N of the run, counted as the law counts it.
        tokens: D of the run.
        steps: Number of steps of the run.
        tasks: Predictions of task accuracies; see `decide.predict_tasks`.
        seed: Seed of the run, for which the band is narrower if the sweep has it; None: another than the sweep's.

    Raises:
        UserError: The law cannot be read, or gives no loss away from its optimum.
    """
    file = law_path / "law.json" if law_path.is_dir() else law_path
    law = read_law(law_path)
    predicted = predict(law, None, params, tokens)
    curve, errors, note = _curve(law, params, tokens, seed, predicted["chosen"]["loss"])
    loss = _of_one_run(law, params, tokens, predicted["chosen"]["loss"])
    return dict(finite({
        "kind": KIND, "format_version": FORMAT_VERSION, "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "law": str(file), "law_hash": hash_file(file), "params": params, "tokens": tokens, "steps": steps,
        "flops": predicted["flops"],
        "times_largest_run": predicted["times_largest_run"], "loss": loss, "curve": curve, "errors": errors,
        "curve_source": note,
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
        wide = stats.norm.ppf((1 + level) / 2) / 1.96 if name not in loss else 1.0
        below, above = (wide * abs(math.log(end / loss["value"])) for end in loss.get(name, loss["interval"]))
        found[name] = [value * math.exp(-math.hypot(below, own)), value * math.exp(math.hypot(above, own))]
    return found


def _curve(
    law: dict[str, Any], params: float, tokens: float, seed: int | None, loss: dict[str, Any]
) -> tuple[list[dict[str, float]], dict[str, Any] | None, str]:
    """The loss and its band for each share of the run's tokens, their errors' correlation, and a note on their source.

    If there is no curve, the list is empty and the note gives the reason.
    """
    sweep = Path(law["source"]["name"])
    if not (sweep / SWEEP_RUNS).exists():
        return [], None, "no curve: the law was not fitted to a sweep, whose runs have one"
    by_law = loss_function(law)
    rows = list(read_lines(sweep / SWEEP_RUNS))
    known = [(row, found) for row in rows if (found := curve_of(sweep, row, by_law)) is not None]
    if len(known) < MIN_CURVES:
        return [], None, f"no curve: {len(known)} runs of the sweep have one, {MIN_CURVES} are needed"
    trunks = read_trunks(sweep, rows)
    texts = [text_noise(trunks, row.get("seed"), float(row["tokens"]), row.get("parent")) for row, _ in known]
    model = predict_curve(
        [row for row, _ in known], np.array([found for _, found in known]), np.array(texts), params, tokens,
        text_noise(trunks, seed, tokens),
    )  # fmt: skip
    if model is None:
        return [], None, f"no curve: {len(trunks) or len(known)} trunks of {sweep.name} are too few"
    law_deviation = max(abs(math.log(end / loss["value"])) for end in loss["interval"]) / 1.96
    quantile = float(stats.t.ppf(1 - (1 - LEVEL) / (2 * BINS), max(len(known) - len(model.powers) - 1, 2)))
    curve = []
    for number, (centre, deviation) in enumerate(zip(model.centre.tolist(), model.deviation.tolist(), strict=True)):
        if not math.isfinite(centre + deviation):
            continue
        value, half = loss["value"] * math.exp(centre), quantile * math.hypot(deviation, law_deviation)
        curve.append({
            "from": number / BINS, "to": (number + 1) / BINS, "loss": value, "low": value * math.exp(-half),
            "high": value * math.exp(half), "deviation": deviation,
        })  # fmt: skip
    if not curve:
        return [], None, f"no curve: the runs of {sweep.name} are logged too rarely: see tracking.every"
    errors = {"correlation": model.correlation, "law_deviation": law_deviation, "terms": model.powers}
    note = f"curves of {len(known)} runs of {sweep.name}, of {model.trunks} trunks; {model.paired} of {BINS} shares "
    note += "by the text of the same seed"
    return curve, errors, note
