"""The charts of a report: the curves of one run, or of several runs in the same plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    losses = curves("loss", "training", 1)
    for number, (run, columns) in enumerate(runs.items()):
        label, color = ("validation", 2) if len(runs) == 1 else (f"{run}, validation", _color(number))
        values = columns.get("val_loss")
        losses.append(Series(label, columns.step, values, cast(Color, color), markers=True, dashed=len(runs) > 1))
    by_source = [series for columns in runs.values() for series in _of_sources(columns)] if len(runs) == 1 else []
    names = sorted({name for columns in runs.values() for name in columns.recorded})
    return [
        Chart("Loss", losses, "nats per token", marks=marks, wide=True, log_switch=True),
        Chart("Loss by source", by_source, "nats per token", marks=marks, wide=True, log_switch=True),
        Chart("Learning rate", curves("lr", "learning rate", 3), value_format=".3~e"),
        Chart("Gradient norm", curves("grad_norm", "gradient norm", 4), marks=marks),
        Chart(
            "Throughput", curves("tokens_per_s", "tokens/s", 1), "tokens/s", marks=marks, value_format=".3~s",
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
        Chart("Wait for data", curves("data_wait_s", "wait", 3, 1e3), "ms a step", marks=marks),
        *(Chart(name, curves(name, name, 1), (units or {}).get(name, ""), marks=marks) for name in names),
    ]  # fmt: skip


def axes(columns: Columns) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Tokens and hours of training at each logged step."""
    steps = columns.step.astype(np.float64)
    found = {"tokens": (steps, columns.get("tokens"))}
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


def _of_sources(columns: Columns) -> list[Series]:
    sources = sorted(name for name in columns.values if name.startswith("loss/"))
    window = max(1, len(columns) // 60)
    return [
        Series(name.removeprefix("loss/"), columns.step, smooth(columns.get(name), window), _color(number))
        for number, name in enumerate(sources[:4])
    ]
