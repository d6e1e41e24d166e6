"""The outputs of `bigtrain scaling fit`: law.json, law.html, law.svg, and a W&B run that records the law."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.scaling import law as formula
from bigtrain.scaling import lines
from bigtrain.scaling.document import unpack, write_law
from bigtrain.scaling.figure import figure
from bigtrain.scaling.fit import Fitted
from bigtrain.scaling.forms import form_path
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.runs.numbers import count
from bigtrain.storage import write_atomic
from bigtrain.tracking.config import TrackingConfig
from bigtrain.tracking.page import Chart, Fact, Mark, Page, Series

TITLES = {
    "form": "Own form", "a1": "A1 envelope", "a2": "A2 IsoFLOP", "a3_huber": "A3 Huber", "a3_l1": "A3 L1",
    "a3_squares": "A3 squares",
}  # fmt: skip
MAX_CURVES = 24
"""Largest number of models for which a chart draws each model as a series of its own."""
_PATH = 80
_WANDB_LIMIT_S = 60.0
_MAX_INFLUENCE = 10


def write_outputs(fitted: Fitted, out: Path, tracking: TrackingConfig | None = None) -> list[Path]:
    """Write law.json, law.html and law.svg into a directory, and a W&B run if `tracking` is given.

    Returns:
        The paths of the three files.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_law(out / "law.json", fitted.law)
    write_atomic(out / "law.html", page(fitted))
    write_atomic(out / "law.svg", figure(fitted))
    if tracking is not None:
        _to_wandb(fitted, out, tracking)
    return [out / "law.json", out / "law.html", out / "law.svg"]


def page(fitted: Fitted) -> str:
    """The law as one self-contained HTML page."""
    law = fitted.law
    source, data = law["source"], law["data"]
    made = Page(
        title="Scaling law",
        subtitle=f"{data['runs']} runs of {data['models']} models from {Path(source['name']).name}, "
        f"{data['flops'][0]:.3g} to {data['flops'][1]:.3g} FLOPs",
    )
    made.headline(_facts(law))
    for warning in law["warnings"]:
        made.note(f"Warning: {warning}.")
    made.heading("What the law says")
    made.charts(_law_charts(fitted))
    made.heading("The approaches")
    _approach_table(made, law)
    made.charts(_approach_charts(fitted))
    if law["agreement"]["pairs"]:
        _agreement_table(made, law)
    if law["held_out"]:
        made.heading("How far to trust it")
        _trust(made, law)
    if law["diagnostics"]:
        made.charts(_diagnostic_charts(fitted))
        _diagnostic_tables(made, law)
    made.heading("Source")
    made.table(["", "value"], _source_rows(law), long=("value",))
    return made.render()


def _number(value: float | None, digits: int = 4) -> str:
    if value is None or not math.isfinite(value):
        return "n/a"
    size = abs(value)
    return f"{value:.{digits}g}" if size == 0 or 1e-4 <= size < 1e5 else f"{value:.{digits - 1}e}"


def _span(ends: list[float | None], digits: int = 4) -> str:
    return f"{_number(ends[0], digits)} to {_number(ends[1], digits)}"


def _facts(law: dict[str, Any]) -> list[Fact]:
    target = law["approaches"][law["primary"]]["target"]
    facts = []
    held = law["held_out"] or {}
    if "error" in held:
        facts.append(
            Fact("Largest run held out", f"{held['error']:+.2%}", f"{held['factor']:.1f} times the fitted FLOPs")
        )
    if "loss" in target:
        facts.append(Fact("Loss at the target", f"{target['loss']['value']:.4f}", _span(target["loss"]["interval"])))
    for name, label in (("params", "Parameters N*"), ("tokens", "Tokens D*")):
        low, high = target[name]["interval"]
        facts.append(Fact(label, count(target[name]["value"]), f"{count(low)} to {count(high)}"))
    ratio = target["tokens_per_param"]
    facts.append(Fact("Tokens a parameter", f"{ratio['value']:.3g}", _span(ratio["interval"], 3)))
    facts.append(Fact("Target", f"{law['target_flops']:.3g}", "FLOPs"))
    one = law["approaches"][law["primary"]]
    facts.append(Fact("N* grows as", f"C^{one['a']:.3f}", f"C^{_span(one['interval']['a'], 3)}"))
    agree = law["agreement"]["agree"]
    if agree is not None:
        facts.append(Fact("The approaches", "agree" if agree else "disagree", "paired bootstrap, 95 %"))
    return facts


def _path(law: dict[str, Any]) -> FloatArray:
    low, high = law["data"]["flops"][0], law["target_flops"]
    return np.exp(np.linspace(np.log(low), np.log(high), _PATH))


def _law_charts(fitted: Fitted) -> list[Chart]:
    law, table = fitted.law, fitted.table
    one, flops = law["approaches"][law["primary"]], _path(fitted.law)
    series = _by_model(fitted)
    if law["primary"].startswith("a3"):
        theta, many = np.array(one["theta"]), unpack(one["replicates"])
        losses = formula.optimal_loss(theta, flops)
        ends = np.quantile(formula.optimal_loss(many[:, None], flops), [0.025, 0.975], axis=0)
        series.append(Series("law at the optimum, 95 %", flops, losses, 2, band=(ends[0], ends[1])))
    elif law["primary"] == "form":
        best = form_path(one, flops)["loss"]
        series.append(Series("law at the optimum, 95 %", flops, best[0], 2, band=(best[1], best[2])))
    if len(series) == 1:
        series = [Series("runs", table.flops, table.loss, 1, points=True)]
    mark = [Mark(law["target_flops"], "target")]
    return [
        Chart("Loss against compute", series, "nats per token", "FLOPs", mark, wide=True, log_x=True, log_y=True,
              log_switch=True, value_format=".5~g"),
        _allocation(law, "params", "N* against compute", "parameters"),
        _allocation(law, "tokens", "D* against compute", "tokens"),
    ]  # fmt: skip


def _by_model(fitted: Fitted) -> list[Series]:
    """The losses of the runs: one series per model, shaded by size, or one series for all if there are many models."""
    table = fitted.table
    names = sorted(set(table.group), key=lambda name: float(table.params[table.group.index(name)]))
    if len(names) > MAX_CURVES:
        return [Series("runs", table.flops, table.loss, 1, points=True)]
    group = np.array(table.group)
    out = []
    for i, name in enumerate(names):
        rows = np.flatnonzero(group == name)
        # Only the smallest, the middle and the largest model are named in the legend.
        unnamed = i not in (0, len(names) // 2, len(names) - 1)
        size = f"{count(float(table.params[rows[0]]))} parameters"
        out.append(
            Series(size, table.flops[rows], table.loss[rows], points=True, ramp=i / max(len(names) - 1, 1),
                   unnamed=unnamed)
        )  # fmt: skip
    return out


def _allocation(law: dict[str, Any], name: str, title: str, unit: str) -> Chart:
    flops = _path(law)
    series = []
    shown = [key for key in ("a1", "a2", law["primary"]) if "refused" not in law["approaches"].get(key, {"refused": 1})]
    for color, key in zip((3, 4, 2), _distinct(shown), strict=False):
        one = law["approaches"][key]
        many = unpack(one["replicates"])
        if key == "form":
            y, low, high = form_path(one, flops)[name]
            series.append(Series(TITLES[key], flops, y, color, band=(low, high)))  # type: ignore[arg-type]
            continue
        if key.startswith("a3"):
            curve = formula.optimal_params if name == "params" else formula.optimal_tokens
            y, spread = curve(np.array(one["theta"]), flops), curve(many[:, None], flops)
        else:
            slope, start = ("a", "ln_params_at_1_flop") if name == "params" else ("b", "ln_tokens_at_1_flop")
            y = np.exp(one[slope] * np.log(flops) + one[start])
            at = lines.params_at if name == "params" else lines.tokens_at
            spread = np.stack([at(many, c) for c in flops], axis=1)
        spread = spread[np.isfinite(spread).all(axis=1)]
        ends = np.quantile(spread, [0.025, 0.975], axis=0)
        band = (ends[0], ends[1]) if key == law["primary"] else None
        series.append(Series(TITLES[key], flops, y, color, dashed=key != law["primary"], band=band))  # type: ignore[arg-type]
    return Chart(
        title, series, unit, "FLOPs", [Mark(law["target_flops"], "target")], log_x=True, log_y=True, value_format=".3~s"
    )


def _distinct(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _approach_table(made: Page, law: dict[str, Any]) -> None:
    names = ("E", "A", "B", "alpha", "beta")
    header = ["Approach", "a of N* ~ C^a", "N* at the target", "D/N", "Loss at the target", *names]
    rows, refused = [], []
    for key, one in law["approaches"].items():
        if "refused" in one:
            refused.append(f"{TITLES[key]} is refused: {one['refused']}.")
            continue
        target = one["target"]
        cells: list[str] = []
        for name in names:
            cells.append(f"{_number(one[name])} [{_span(one['interval'][name], 3)}]" if name in one else "")
        loss = target.get("loss")
        rows.append([
            TITLES[key], f"{one['a']:.4f} [{_span(one['interval']['a'], 3)}]",
            f"{count(target['params']['value'])} [{count(target['params']['interval'][0])} to "
            f"{count(target['params']['interval'][1])}]",
            f"{target['tokens_per_param']['value']:.3g} [{_span(target['tokens_per_param']['interval'], 3)}]",
            f"{loss['value']:.4f} [{_span(loss['interval'])}]" if loss else "", *cells,
        ])  # fmt: skip
    made.table(header, rows)
    made.note("In brackets 95 % intervals: percentiles of a bootstrap over runs, "
              f"{law['data']['clusters']} clusters ({law['options']['cluster']}).")  # fmt: skip
    for text in refused:
        made.note(text)
    if own := law["approaches"].get("form"):
        made.note(f"The own form is {own['expression']}.")
        made.table(["Constant", "Value", "95 %"], [
            [name, _number(value, 5), _span(own["interval"][name])] for name, value in own["constants"].items()
        ])  # fmt: skip


def _approach_charts(fitted: Fitted) -> list[Chart]:
    law, table = fitted.law, fitted.table
    charts = []
    one = law["approaches"].get("a2", {"refused": 1})
    if "refused" not in one:
        budgets = [budget for budget in one["budgets"] if not budget["refused"]]
        series, minima_x, minima_y = [], [], []
        for i, budget in enumerate(budgets):
            rows = np.abs(np.log(table.flops / budget["flops"])) < 0.1
            ends = budget["window_tokens"]
            shade = i / max(len(budgets) - 1, 1)
            named = i in (0, len(budgets) // 2, len(budgets) - 1)
            series.append(
                Series(f"{budget['flops']:.2g} FLOPs", table.tokens[rows], table.loss[rows], points=True, ramp=shade,
                       unnamed=not named)
            )  # fmt: skip
            x = np.geomspace(ends[0], ends[1], 40)
            fit = np.polyval(budget["parabola_in_ln_tokens"], np.log(x))
            series.append(Series("parabola", x, fit, ramp=shade, unnamed=True))
            minima_x.append(budget["tokens"])
            minima_y.append(budget["loss"])
        series.append(Series("minima", minima_x, minima_y, 2, points=True))
        charts.append(Chart("IsoFLOP", series, "nats per token", "tokens", wide=True, log_x=True, value_format=".5~g"))
    one = law["approaches"].get("a1", {"refused": 1})
    if "refused" not in one:
        points = one["hull"]
        flops = [point["flops"] for point in points]
        series = [
            Series("all points", table.flops, table.loss, 1, points=True),
            Series("lower hull", flops, [point["loss"] for point in points], 2, markers=True),
        ]
        charts.append(
            Chart("Envelope", series, "nats per token", "FLOPs", wide=not charts, log_x=True,
                  log_y=True, value_format=".5~g")
        )  # fmt: skip
    return charts


def _agreement_table(made: Page, law: dict[str, Any]) -> None:
    rows = []
    for pair in law["agreement"]["pairs"]:
        rows.append([
            f"{TITLES[pair['first']]} and {TITLES[pair['second']]}", f"{pair['exponent_difference']:+.4f}",
            _span(pair["exponent_difference_interval"], 3), f"{pair['params_ratio_at_target']:.3f}",
            _span(pair["params_ratio_interval"], 3), "agree" if pair["agree"] else "DISAGREE",
        ])  # fmt: skip
    made.table(["Pair", "Difference of a", "95 %", "Ratio of N* at the target", "95 %", ""], rows)


def _trust(made: Page, law: dict[str, Any]) -> None:
    held = law["held_out"] or {}
    if "error" in held:
        rows = [
            ["This law", f"{held['error']:+.2%}"],
            ["The loss of the nearest fitted run", f"{held['nearest_run_error']:+.2%}"],
            ["A power law in FLOPs alone", f"{held['power_law_error']:+.2%}"],
        ]
        made.note(
            f"Fitted to the {held['fitted']} runs below a third of the largest one's FLOPs, the law predicts "
            f"{held['predicted']:.4f} for it, 95 % {_span(held['prediction_interval'])}; "
            f"measured {held['measured']:.4f}. "
            f"Over all {held['held_out']} runs held out it errs by {held['mean_absolute_error']:.2%}."
        )
        made.table(["Prediction of the largest run", "Error"], rows)
    elif "refused" in held:
        made.note(f"Nothing was held out: {held['refused']}.")


def _diagnostic_charts(fitted: Fitted) -> list[Chart]:
    law, table = fitted.law, fitted.table
    one = law["approaches"][law["primary"]]
    theta, many = np.array(one["theta"]), unpack(one["replicates"])
    residual = 100 * (formula.loss(theta, table.params, table.tokens) / table.loss - 1)
    charts = [
        Chart("Residuals against compute", [Series("residual", table.flops, residual, 1, points=True)],
              "%, predicted over measured", "FLOPs", log_x=True, value_format="+.3f"),
        Chart("Residuals against D/N", [Series("residual", table.tokens / table.params, residual, 1, points=True)],
              "%, predicted over measured", "tokens a parameter", log_x=True, value_format="+.3f"),
        Chart("Exponents of the replicates", [Series("replicates", many[:, 3], many[:, 4], 4, points=True)],
              "beta", "alpha", value_format=".3f"),
    ]  # fmt: skip
    found = law["diagnostics"]["delta_sensitivity"]
    deltas = [row["delta"] for row in found]
    losses = [row["target_loss"] for row in found]
    charts.append(
        Chart("Loss at the target by delta", [Series("loss", deltas, losses, 3, markers=True)], "nats per token",
              "Huber's delta", log_x=True, value_format=".5~g")
    )  # fmt: skip
    return charts


def _diagnostic_tables(made: Page, law: dict[str, Any]) -> None:
    rows = []
    for key, one in law["approaches"].items():
        if "search" in one:
            search = one["search"]
            rows.append([
                TITLES[key], f"{one['objective']:.8g}", f"{search['converged_starts']:.0%} of {search['starts']}",
                f"{search['projection_objective']:.8g}", f"{search['condition_number']:.3g}",
                f"{search['refits_agreed']:.1%}", f"{one['noise']:.2%}",
            ])  # fmt: skip
    made.table(
        ["Search", "Objective", "Starts that reached it", "By variable projection", "Condition number",
         "Refits found twice", "Noise of a run"], rows,
    )  # fmt: skip
    top = law["diagnostics"]["influence"][:_MAX_INFLUENCE]
    made.note("Without a model, or a run, the loss at the target changes by this much; the most influential first.")
    made.table(["Excluded", "Change"], [[row["name"], f"{row['target_loss_change']:+.5f}"] for row in top])


def _source_rows(law: dict[str, Any]) -> list[list[str]]:
    source = law["source"]
    rows = [["file", source["name"]], ["hash of the data", source["data_hash"]]]
    rows.append(["rows", f"{source['rows_used']} of {source['rows_read']}"])
    if source["where"]:
        rows.append(["where", source["where"]])
    if source["drop_highest"]:
        rows.append(["highest losses excluded", str(source["drop_highest"])])
    rows += [["read", note] for note in source["notes"]]
    if found := law.get("overlap"):
        rows.append(
            [
                "overlap",
                f"{found['share']:.2%} of {found['passages']} held-out passages are in the training "
                f"text ({found['exact']} exact, {found['near']} near copies)",
            ]
        )
    rows.append(["seed", str(law["seed"])])
    rows.append(["versions", ", ".join(f"{name} {version}" for name, version in law["versions"].items())])
    return rows


def _to_wandb(fitted: Fitted, out: Path, tracking: TrackingConfig) -> None:
    """Write one W&B run with the options as its config, the results of each approach, a table of runs and the page."""
    from bigtrain.tracking.process import Trackers

    law, table = fitted.law, fitted.table
    config = {
        "source": law["source"], "data": law["data"], "options": law["options"], "kind": law["kind"],
        "phase": "scaling-law",
    }  # fmt: skip
    own = tracking.model_copy(update={"tags": [*tracking.tags, "scaling-law"]})
    tracker = Trackers(out, "scaling-law", config, own)
    row: dict[str, Any] = {"step": 0, "target_flops": law["target_flops"]}
    for key, one in law["approaches"].items():
        for name in ("A", "B", "E", "alpha", "beta", "a", "b", "objective"):
            if one.get(name) is not None:
                row[f"{key}/{name}"] = one[name]
        for name, value in one.get("target", {}).items():
            if isinstance(value, dict):
                row[f"{key}/target_{name}"] = value["value"]
                row[f"{key}/target_{name}_low"], row[f"{key}/target_{name}_high"] = value["interval"]
    columns = ["run", "group", "params", "tokens", "flops", "loss"]
    values = zip(*(getattr(table, name) for name in columns), strict=True)
    row["runs"] = {"_wandb_table": columns, "rows": [[*one[:2], *map(float, one[2:])] for one in values]}
    row["page"] = {"_wandb_html": str((out / "law.html").absolute())}
    tracker.put(row)
    tracker.close(_WANDB_LIMIT_S)
