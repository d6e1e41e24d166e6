"""The charts of a report: the curves of one run, or of several runs in the same plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, cast

import numpy as np

from bigtrain.tracking.history import Columns, FloatArray
from bigtrain.tracking.page import Chart, Mark, Series, Smoothing

Color = Literal[1, 2, 3, 4]

SMOOTH_FROM = 200
"""Smallest number of logged steps for which a curve is shown with its running mean."""
_WINDOWS: Final[dict[Smoothing, int]] = {"light": 200, "medium": 60, "strong": 15}
"""For each smoothing, the number of logged steps divided by the window of the running mean."""
_SMOOTH_POINTS = 400


def smooth(values: FloatArray, window: int) -> FloatArray:
    """Centred running mean over `window` values, which has no lag; values that are not finite are skipped.

    Args:
        values: Shape (n,).
        window: Number of values in a mean; fewer at the ends of the array.

    Returns:
        Shape (n,); NaN where the window has no finite value.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    low = np.maximum(np.arange(len(values)) - window // 2, 0)
    high = np.minimum(np.arange(len(values)) + window // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):
        return np.asarray((sums[high] - sums[low]) / (counts[high] - counts[low]), dtype=np.float64)


def charts(
    runs: Mapping[str, Columns], marks: Sequence[Mark] = (), units: Mapping[str, str] | None = None
) -> list[Chart]:
    """Build the charts of one run, or of several runs with one colour for each.

    Args:
        runs: Columns of metrics.jsonl, by the name of the run.
        marks: Events, which are shown as vertical lines at their steps.
        units: Units of metrics, by the metric's name.
    """

    def curves(name: str, label: str, color: Color, factor: float = 1.0) -> list[Series]:
        found = []
        for number, (run, columns) in enumerate(runs.items()):
            own = label if len(runs) == 1 else run
            hue = color if len(runs) == 1 else _color(number)
            found += _with_mean(columns, name, own, hue, factor, several=len(runs) > 1)
        return found

    known = units or {}
    runs = {
        name: Columns(columns.step, {**columns.values, "data_wait_s": columns.wait_ms})
        for name, columns in runs.items()
    }
    loss_unit, rate_unit = known.get("loss", ""), known.get("tokens_per_s", "tokens/s")
    one = next(iter(runs.values())) if len(runs) == 1 else None
    has_parts = one is not None and bool(one.parts)
    losses = curves("loss", "training", 1)
    for number, (run, columns) in enumerate(runs.items()):
        label, color = ("validation", 2) if len(runs) == 1 else (f"{run}, validation", _color(number))
        values = columns.get("val_loss")
        losses.append(Series(label, columns.step, values, cast(Color, color), markers=True, dashed=len(runs) > 1))
    if one is not None and has_parts:
        losses, loss_unit = _of_parts(one), ""
    return [
        Chart("Loss", losses, loss_unit, marks=marks, wide=True, log_switch=True),
        *(_of_sets(one, loss_unit, marks) if one is not None else ()),
        Chart("Learning rate", curves("lr", "learning rate", 3), value_format=".3~e"),
        # Each part has its own norm, recorded by name.
        *([] if has_parts else [Chart("Gradient norm", curves("grad_norm", "gradient norm", 4), marks=marks)]),
        Chart(
            "Throughput", curves("tokens_per_s", rate_unit, 1), rate_unit, marks=marks, value_format=".3~s",
            from_zero=True,
        ),
        Chart(
            "MFU", curves("mfu", "MFU", 1), "share of dense peak", marks=marks,
            value_format=".1%", tick_format=".0%", from_zero=True,
        ),
        Chart(
            "Memory", curves("memory_bytes", "memory", 2, 2.0**-30), "GiB, peak of the worst rank", marks=marks,
            from_zero=True,
        ),
        Chart("Wait for data", curves("data_wait_s", "wait", 3), "ms per step", marks=marks),
        *_of_recorded(runs, curves, known, marks),
    ]  # fmt: skip


def _of_parts(columns: Columns) -> list[Series]:
    """The training and the validation loss of each part of a model, in one colour."""
    found = []
    for number, part in enumerate(columns.parts):
        found += _with_mean(columns, f"loss/{part}", part, _color(number), 1.0, several=True)
        name = f"val_loss/{part}"
        found.append(
            Series(f"{part}, validation", columns.step, columns.get(name), _color(number), markers=True, dashed=True)
        )
    return found


def _of_sets(columns: Columns, unit: str, marks: Sequence[Mark]) -> list[Chart]:
    """The losses of a mixture's sources, and of several held-out sets, each in one chart."""
    sets = sorted(name.removeprefix("val_loss/") for name in columns.values if name.startswith("val_loss/"))
    charts = {
        "Loss by source": {name: columns.get(f"loss/{name}") for name in columns.sources},
        "Validation loss by set": {name: columns.get(f"val_loss/{name}") for name in sets if name not in columns.parts},
    }
    return [
        Chart(title, _family(values, columns), unit, marks=marks, wide=True, log_switch=True)
        for title, values in charts.items()
    ]


def _of_recorded(
    runs: Mapping[str, Columns],
    curves: Callable[..., list[Series]],
    units: Mapping[str, str],
    marks: Sequence[Mark],
) -> list[Chart]:
    """A chart for each recorded metric, in which training and evaluation stand together.

    Of one run, metrics with one prefix (`weight_norm/layers`, `weight_norm/head`) share a chart.
    """
    names = sorted({name for columns in runs.values() for name in columns.recorded})
    groups: dict[str, list[str]] = {}
    for name in names:
        plain = name.removeprefix("val_")
        first, slash, rest = name.partition("/")
        together = len(runs) == 1 and slash and "/" not in rest
        groups.setdefault(first if together else plain if plain in names else name, []).append(name)
    found = []
    for title, members in groups.items():
        unit = units.get(members[0], "")
        if len(runs) == 1 and members[0].startswith(f"{title}/"):
            (columns,) = runs.values()
            values = {name.removeprefix(f"{title}/"): columns.get(name) for name in members}
            found.append(Chart(title, _family(values, columns), unit, marks=marks))
            continue
        series = []
        for name in members:
            of = "validation" if len(members) > 1 and name.startswith("val_") else "training"
            series += curves(name, of if len(members) > 1 else name, 2 if of == "validation" else 1)
        found.append(Chart(title, series, unit, marks=marks))
    return found


def axes(columns: Columns, counted: str) -> dict[str, tuple[FloatArray, FloatArray]]:
    """What counts in the loss (`counted`: tokens, images) and hours of training, at each logged step."""
    steps = columns.step.astype(np.float64)
    found = {counted: (steps, columns.get("tokens"))}
    hours = np.cumsum(columns.seconds) / 3600
    return found | ({"hours": (steps, hours)} if hours.any() else {})


def _color(number: int) -> Color:
    return cast(Color, number % 4 + 1)


def _with_mean(columns: Columns, name: str, label: str, color: Color, factor: float, several: bool) -> list[Series]:
    """The curve of a column; a long curve is faint, with one running mean for each setting of the smoothing."""
    values = columns.get(name) * factor
    known = np.isfinite(values)
    if known.sum() < SMOOTH_FROM:
        return [Series(label, columns.step[known], values[known], color, markers=bool(known.sum() < len(values) / 2))]
    found = [Series(f"{label}, each step", columns.step, values, color, faint=True, unnamed=several)]
    thin = np.unique(np.linspace(0, len(values) - 1, _SMOOTH_POINTS).astype(np.int64))
    for smoothing, share in _WINDOWS.items():
        mean = smooth(values, max(3, len(values) // share))
        mean_label = label if several else f"{label}, mean"
        found.append(Series(mean_label, columns.step[thin], mean[thin], color, smoothing=smoothing))
    return found


def _family(values: Mapping[str, FloatArray], columns: Columns) -> list[Series]:
    """One curve for each name, smoothed if there are many steps; more than four have shades of one colour."""
    found = []
    for number, (name, column) in enumerate(values.items()):
        known = np.isfinite(column)
        x, y = columns.step[known], column[known]
        ramp = number / (len(values) - 1) if len(values) > 4 else None
        points = bool(known.sum() < len(column) / 2)
        found.append(Series(name, x, smooth(y, max(1, len(y) // 60)), _color(number), markers=points, ramp=ramp))
    return found
