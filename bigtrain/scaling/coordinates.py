"""A coordinate check: how activations and their changes grow with the width, as a table and as a picture.

Under muP, each coordinate of an activation changes by the same size at all widths (Yang et al. 2022, appendix D.1): the
slope of ln |change| over ln width is 0. In the standard parametrization with Adam, the changes of hidden activations
and logits grow with the width, with slope 1. The reason is that all entries of a matrix change by the same size, and
their products with the inputs are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.scaling.lines import line
from bigtrain.scaling.svg import GRID, QUIET, Axes, label, picture, polyline
from bigtrain.storage import write_atomic, write_json

KIND, FORMAT_VERSION = "bigtrain coordinate check", 1
FLAT = 0.35
"""Largest slope that counts as flat. At small widths, slopes differ from their limit by up to 0.25; a missing factor of
sqrt(width) changes a slope by 0.5."""
_COLORS = {"embedding": "#63666d", "attention": "#12408a", "mlp": "#c2580a", "logits": "#b3261e"}
_PANEL, _HEIGHT, _LEFT, _TOP, _BOTTOM, _LEGEND = 300, 380, 62, 56, 328, 130


def judge(measured: dict[str, Any]) -> dict[str, Any]:
    """Compute the slopes over the width, and a verdict for each place (embedding, a branch of a layer, logits).

    Args:
        measured: The result of `training.coordinates.measure_coordinates`, for two or more widths.

    Returns:
        `measured` with these keys added. `slopes`: slopes of `size` and `change`, by place and number of steps done;
        None if a value is zero or not finite. `verdicts`, by place after the last step: flat, grows or shrinks; grows
        also if a value is not finite; zero if activations or their changes are zero at some width, so that they have no
        slope. `flat`: whether all verdicts are flat. Only a change can be judged as shrinking, because under muP the
        initial logits shrink with sqrt(width).
    """
    slopes = {
        kind: {place: _slopes(measured["widths"], measured[kind][place]) for place in measured["places"]}
        for kind in ("size", "change")
    }
    verdicts = {
        place: _verdict([
            ([row[-1] for row in measured[kind][place]], slopes[kind][place][-1]) for kind in ("size", "change")
        ])
        for place in measured["places"]
    }  # fmt: skip
    flat = set(verdicts.values()) == {"flat"}
    head = {"format_version": FORMAT_VERSION, "kind": KIND}
    return {**head, **measured, "slopes": slopes, "verdicts": verdicts, "flat": flat}


def write_coordinates(result: dict[str, Any], out: Path) -> list[Path]:
    """Write coordinates.json and coordinates.svg into a directory, and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "coordinates.json", out / "coordinates.svg"]
    write_json(files[0], result)
    write_atomic(files[1], coordinates_picture(result))
    return files


def _slopes(widths: list[int], values: list[list[float]]) -> list[float | None]:
    """The slope over the width after each number of steps; `values` are by width, then by number of steps."""
    found: list[float | None] = []
    for column in np.array(values).T:
        fits = np.isfinite(column).all() and (column > 0).all()
        found.append(line(np.log(widths), np.log(column))[0] if fits else None)
    return found


def _verdict(measured: Sequence[tuple[list[float], float | None]]) -> str:
    """The verdict for a place, from the values by width and the slope of its size, then of its change."""
    if any(not np.isfinite(values).all() or (slope or 0) > FLAT for values, slope in measured):
        return "grows"
    slopes = [slope for _, slope in measured if slope is not None]
    if len(slopes) < len(measured):
        return "zero"
    return "shrinks" if slopes[-1] < -FLAT else "flat"


def coordinates_text(result: dict[str, Any]) -> str:
    """A table of the values before training, after the first step and after the last; the JSON contains all steps."""
    widths, steps = result["widths"], result["steps"]
    rows = [["", "steps", *(str(width) for width in widths), "slope", ""]]
    for place in result["places"]:
        for kind, title in (("size", "|x|"), ("change", "|change|")):
            for step in sorted({0, 1, steps} if kind == "size" else {1, steps}):
                slope = result["slopes"][kind][place][step]
                values = [f"{row[step]:.3g}" for row in result[kind][place]]
                last = step == steps and kind == "change"
                rows.append([
                    f"{place} {title}", str(step), *values, "n/a" if slope is None else f"{slope:+.2f}",
                    result["verdicts"][place] if last else "",
                ])  # fmt: skip
    sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{result['model']}; learning rate {result['lr']:g}; each step {result['data']}"]
    lines.append("mean |activation| of the first step's sequences, and its mean |change| since the start, by width")
    for row in rows:
        cells = (cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True))
        lines.append("  ".join((row[0].ljust(sizes[0]), *cells)).rstrip())
    lines.append("loss of the last step: " + ", ".join(f"{row[-1]:.3f}" for row in result["losses"]))
    odd = [f"{place} {verdict}" for place, verdict in result["verdicts"].items() if verdict != "flat"]
    flat = f"flat: after the last step no change has a slope beyond {FLAT}"
    lines.append(f"with the width: {'; '.join(odd)}" if odd else flat)
    return "\n".join([*lines, *result.get("files", [])])


def coordinates_picture(result: dict[str, Any]) -> str:
    """An SVG with mean |activation| and mean |change| after the last step against the width, one line per place."""
    parts = []
    for number, (kind, title) in enumerate((("size", "mean |activation|"), ("change", "mean |change|"))):
        values = {place: [row[-1] for row in result[kind][place]] for place in result["places"]}
        left = _LEFT + number * (_PANEL + _LEFT)
        parts += _panel(result["widths"], values, f"{title} after {result['steps']} steps", left)
    x, y = 2 * (_LEFT + _PANEL) + 16, _TOP + 8
    for kind, color in _COLORS.items():
        parts += [polyline([(x - 2, y - 4), (x + 10, y - 4)], color, 2), label(x + 16, y, kind)]
        y += 18
    parts.append(label(14, 20, f"{result['model']}: {'flat' if result['flat'] else 'not flat'}"))
    return picture(
        "Activations of a model against its width, after the first steps", x + _LEGEND, _HEIGHT, parts
    )  # fmt: skip


def _panel(widths: list[int], values: dict[str, list[float]], title: str, left: int) -> list[str]:
    shown = [one for row in values.values() for one in row if np.isfinite(one) and one > 0]
    low, high = (min(shown, default=1.0) / 1.5, max(shown, default=1.0) * 1.5)
    axes = Axes((widths[0] / 1.1, widths[-1] * 1.1), (low, high), left, left + _PANEL, _TOP, _BOTTOM)
    parts = [label(left, _TOP - 12, title, QUIET), label(left + _PANEL / 2, _BOTTOM + 38, "width", QUIET, "middle")]
    for width in widths:
        x, _ = axes.at(width, low)
        parts += [polyline([(x, _TOP), (x, _BOTTOM)], GRID, 1), label(x, _BOTTOM + 18, str(width), QUIET, "middle")]
    powers = range(int(np.floor(np.log10(low))), int(np.floor(np.log10(high))) + 1)
    for tick in (tick for power in powers for tick in (10.0**power, 3 * 10.0**power) if low < tick < high):
        _, y = axes.at(widths[0], tick)
        parts.append(polyline([(left, y), (left + _PANEL, y)], GRID, 1))
        parts.append(label(left - 8, y + 4, f"{tick:g}", QUIET, "end"))
    for place, row in values.items():
        points = [axes.at(width, one) for width, one in zip(widths, row, strict=True) if np.isfinite(one) and one > 0]
        parts.append(polyline(points, _COLORS[place.rpartition(".")[2]], 1.5))
    return parts
