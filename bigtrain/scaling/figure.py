"""The figure law.svg: the runs, the law at the optimum, and the prediction of the largest run; a README can show it.

The SVG is written directly, since a chart of points and lines needs no library. The horizontal axis is 6 N D, because
the law's optimum is computed from these FLOPs. Exact FLOPs are larger and would move the runs to the right of the law.
"""

from __future__ import annotations

import math

import numpy as np

from bigtrain.scaling import law as formula
from bigtrain.scaling.document import unpack
from bigtrain.scaling.fit import Fitted
from bigtrain.scaling.forms import form_path
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN, FloatArray
from bigtrain.scaling.runs.numbers import count
from bigtrain.scaling.runs.table import RunTable
from bigtrain.scaling.svg import GRID, QUIET, Axes, label, picture, polyline

WIDTH, HEIGHT = 760, 430
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 150, 58, 52
MAX_POINTS = 400
"""Largest number of runs that are plotted; of more runs only every second, third, ... one is plotted."""
_PATH = 60
_LOW, _HIGH = (158, 195, 238), (18, 63, 128)
_LAW, _HELD = "#c2580a", "#b3261e"
_TICKS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)


def figure(fitted: Fitted) -> str:
    """The figure as SVG text."""
    law, table = fitted.law, fitted.table
    flops = np.exp(np.linspace(np.log(_compute(table).min()), np.log(law["target_flops"]), _PATH))
    curve, ends = _curve(fitted, flops)
    losses = np.concatenate([table.loss, curve, ends.ravel()])
    x, y = (float(flops[0]) / 1.2, float(flops[-1]) * 1.2), (float(losses.min()) * 0.97, float(losses.max()) * 1.03)
    axes = Axes(x, y, _LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM)
    parts = [*_frame(axes), *_law(axes, flops, curve, ends), *_runs(axes, fitted), *_legend(fitted, len(curve) > 0)]
    title = f"Loss of {len(table)} runs against compute, and the law fitted to them"
    return picture(title, WIDTH, HEIGHT, parts)


def _compute(table: RunTable) -> FloatArray:
    return FLOPS_PER_PARAMETER_TOKEN * table.params * table.tokens


def _curve(fitted: Fitted, flops: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The loss at the optimum, shape (P,), and its 95 % interval, shape (2, P); empty if the law gives no loss."""
    one = fitted.law["approaches"][fitted.law["primary"]]
    if fitted.law["primary"] == "form":
        best, low, high = form_path(one, flops)["loss"]
        return best, np.stack([low, high])
    if not fitted.law["primary"].startswith("a3"):
        return np.empty(0), np.empty((2, 0))
    many = formula.optimal_loss(unpack(one["replicates"])[:, None], flops)
    many = many[np.isfinite(many).all(axis=1)]
    return formula.optimal_loss(np.array(one["theta"]), flops), np.quantile(many, [0.025, 0.975], axis=0)


def _frame(axes: Axes) -> list[str]:
    parts = []
    low, high = axes.x
    for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        x, _ = axes.at(10.0**power, axes.y[0])
        parts.append(polyline([(x, _TOP), (x, HEIGHT - _BOTTOM)], GRID, 1))
        parts.append(label(x, HEIGHT - _BOTTOM + 18, f"1e{power}", QUIET, "middle"))
    ticks = [tick * 10.0**power for power in range(-3, 3) for tick in _TICKS]
    for tick in (tick for tick in ticks if axes.y[0] < tick < axes.y[1]):
        _, y = axes.at(low, tick)
        parts.append(polyline([(_LEFT, y), (WIDTH - _RIGHT, y)], GRID, 1))
        parts.append(label(_LEFT - 8, y + 4, f"{tick:g}", QUIET, "end"))
    parts.append(label((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 14, "FLOPs, 6 N D", QUIET, "middle"))
    parts.append(label(14, 20, "loss, nats per token", QUIET))
    return parts


def _law(axes: Axes, flops: FloatArray, curve: FloatArray, ends: FloatArray) -> list[str]:
    if not len(curve):
        return []
    there = [axes.at(float(x), float(y)) for x, y in zip(flops, ends[0], strict=True)]
    back = [axes.at(float(x), float(y)) for x, y in zip(flops, ends[1], strict=True)][::-1]
    shade = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*there, *back])
    points = [axes.at(float(x), float(y)) for x, y in zip(flops, curve, strict=True)]
    return [f'<polygon points="{shade}" fill="{_LAW}" fill-opacity="0.16"/>', polyline(points, _LAW, 2)]


def _runs(axes: Axes, fitted: Fitted) -> list[str]:
    table, held = fitted.table, fitted.law["held_out"] or {}
    compute, parts = _compute(table), []
    for i in range(0, len(table), -(-len(table) // MAX_POINTS)):
        x, y = axes.at(float(compute[i]), float(table.loss[i]))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{_shade(fitted, float(table.params[i]))}"/>')
    if "error" in held:
        largest = FLOPS_PER_PARAMETER_TOKEN * held["params"] * held["tokens"]
        x, y = axes.at(largest, held["measured"])
        low, high = (axes.at(largest, end)[1] for end in held["prediction_interval"])
        parts.append(polyline([(x, low), (x, high)], _HELD, 2))
        parts += [polyline([(x - 5, end), (x + 5, end)], _HELD, 2) for end in (low, high)]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="none" stroke="{_HELD}" stroke-width="1.5"/>')
    return parts


def _shade(fitted: Fitted, params: float) -> str:
    low, high = (math.log(end) for end in fitted.law["data"]["params"])
    share = (math.log(params) - low) / (high - low) if high > low else 1.0
    return f"rgb({','.join(str(round(a + share * (b - a))) for a, b in zip(_LOW, _HIGH, strict=True))})"


def _legend(fitted: Fitted, has_curve: bool) -> list[str]:
    table, held = fitted.table, fitted.law["held_out"] or {}
    x, y = WIDTH - _RIGHT + 16, _TOP + 8
    sizes = sorted(set(table.params.tolist()))
    parts = [label(x, y, "parameters", QUIET)]
    for params in sizes if len(sizes) <= 8 else (sizes[0], sizes[len(sizes) // 2], sizes[-1]):
        y += 18
        parts.append(f'<circle cx="{x + 4}" cy="{y - 4}" r="3.5" fill="{_shade(fitted, params)}"/>')
        parts.append(label(x + 16, y, count(params)))
    if has_curve:
        y += 28
        parts += [polyline([(x - 2, y - 4), (x + 10, y - 4)], _LAW, 2), label(x + 16, y, "law at the best N")]
        parts.append(label(x + 16, y + 15, "and 95 %", QUIET))
        y += 15
    if "error" in held:
        low, high = held["prediction_interval"]
        said = (
            f"largest run, from runs of at most 1/{held['factor']:.1f} of its FLOPs: {held['predicted']:.4f} "
            f"[{low:.4f}, {high:.4f}]; measured {held['measured']:.4f}, error {held['error']:+.2%}"
        )
        parts.append(label(14, 40, said, _HELD))
    return parts
