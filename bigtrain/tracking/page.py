"""The renderer of all HTML pages: self-contained files that open offline, in light or dark mode and at any width.

All texts are escaped here, so callers pass unescaped texts. The Content-Security-Policy of a page forbids it to fetch
any resource.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

MAX_POINTS = 1500
PARTS_OF_A_WHOLE = 9
"""Number of colours, and so of possible parts, of a bar of shares; a run's wall time has this many parts."""
Smoothing = Literal["off", "light", "medium", "strong"]
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def downsample(
    x: npt.ArrayLike, y: npt.ArrayLike, max_points: int = MAX_POINTS
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Reduce a curve to at most `max_points` points, keeping spikes: the smallest and largest y of each range of x.

    Args:
        x: Shape (n,), increasing.
        y: Shape (n,); points that are not finite are skipped.
        max_points: Largest number of points to keep.

    Returns:
        x and y of the kept points, float64, shape (k,).
    """
    all_x, all_y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    known = np.isfinite(all_y) & np.isfinite(all_x)
    few_x, few_y = all_x[known], all_y[known]
    if len(few_x) <= max_points:
        return few_x, few_y
    edges = np.linspace(0, len(few_x), max_points // 2 + 1).astype(np.int64)
    kept = {0, len(few_x) - 1}
    for low, high in itertools.pairwise(edges[1:-1]):
        kept.add(int(low + np.argmin(few_y[low:high])))
        kept.add(int(low + np.argmax(few_y[low:high])))
    chosen = np.array(sorted(kept))
    return few_x[chosen], few_y[chosen]


@dataclass(frozen=True)
class Series:
    """One curve of a chart; points that are not finite are skipped, and long curves are downsampled."""

    name: str
    x: npt.ArrayLike
    y: npt.ArrayLike
    color: Literal[1, 2, 3, 4] = 1
    faint: bool = False
    """Whether the curve is thin and behind the others, like raw values behind their mean."""
    markers: bool = False
    """Whether each point of the curve has a marker."""
    points: bool = False
    """Whether to show only points, in any order of x; the hover text then shows one point and not all series."""
    dashed: bool = False
    ramp: float | None = None
    """Position between 0 and 1 on a colour scale, for an ordered family of series; None: use `color`."""
    unnamed: bool = False
    """Whether the series is omitted from the legend."""
    smoothing: Smoothing | Literal[""] = ""
    """The setting of the page's smoothing switch at which the series is shown; empty: at all settings."""
    band: tuple[npt.ArrayLike, npt.ArrayLike] | None = None
    """Lower and upper ends of an interval around each y, which is shaded; shape (n,) each."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at the x of an event."""

    x: float
    text: str
    kind: Literal["fault", "restart"] = "restart"


@dataclass(frozen=True)
class Chart:
    """A titled chart of one or more series."""

    title: str
    series: Sequence[Series]
    unit: str = ""
    x_title: str = "step"
    marks: Sequence[Mark] = ()
    wide: bool = False
    log_switch: bool = False
    """Whether the reader can switch y between linear and logarithmic."""
    log_y: bool = False
    log_x: bool = False
    from_zero: bool = False
    """Whether a linear y axis begins at zero, as it should for amounts."""
    value_format: str = ".4~g"
    """Format of values in the hover text, in d3's notation."""
    tick_format: str = ""
    """Format of the ticks of y, in d3's notation; empty: plotly's default."""


@dataclass(frozen=True)
class Fact:
    """One headline number, with an optional note in small print below it."""

    label: str
    value: str
    note: str = ""


@dataclass
class Page:
    """A page, to which methods add parts from top to bottom; `render` returns the HTML."""

    title: str
    subtitle: str = ""
    _parts: list[str] = field(default_factory=list)
    _has_charts: bool = False
    _axes: str = ""

    def controls(self, axes: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]) -> None:
        """Add switches for all charts over steps: for the quantity of the x axis and for the smoothing of curves.

        Args:
            axes: For each further quantity of the x axis ("tokens", "hours"): increasing steps, and the value at each.
        """
        tables = {}
        for title, (steps, values) in axes.items():
            x, y = downsample(steps, values, 400)
            if len(x):
                tables[title] = [_numbers(x), _numbers(y)]
        self._axes = f'<script type="application/json" id="axes">{_json(tables)}</script>'
        switches = _switch("axis", ["step", *tables], "step"), _switch("smoothing", get_args(Smoothing), "medium")
        self._parts.append(f'<div class="controls">x {switches[0]} smoothing {switches[1]}</div>')

    def heading(self, text: str) -> None:
        """Add a heading, which begins a section."""
        self._parts.append(f"<h2>{_text(text)}</h2>")

    def note(self, text: str) -> None:
        """Add a paragraph in a muted style."""
        self._parts.append(f'<p class="note">{_text(text)}</p>')

    def headline(self, facts: Iterable[Fact]) -> None:
        """Add the most important numbers, in large print."""
        cells = []
        for fact in facts:
            note = f"<small>{_text(fact.note)}</small>" if fact.note else ""
            cells.append(f"<div><dt>{_text(fact.label)}</dt><dd>{_text(fact.value)}{note}</dd></div>")
        self._parts.append(f'<dl class="headline">{"".join(cells)}</dl>')

    def shares(self, parts: Sequence[tuple[str, float, str]]) -> None:
        """Add a bar of at most PARTS_OF_A_WHOLE parts: (label, amount, amount as text), which add up to 100%."""
        if len(parts) > PARTS_OF_A_WHOLE:
            raise ValueError(f"a bar has colours for {PARTS_OF_A_WHOLE} parts, not for {len(parts)}")
        total = sum(amount for _, amount, _ in parts) or 1.0
        bar, legend = [], []
        for i, (label, amount, text) in enumerate(parts):
            if amount <= 0:
                continue
            bar.append(f'<i class="s{i}" style="width:{100 * amount / total:.3f}%"></i>')
            legend.append(f'<li><i class="s{i}"></i>{_text(label)} <span>{_text(text)}</span></li>')
        bar_html = f'<div class="shares">{"".join(bar)}</div><ul class="legend">{"".join(legend)}</ul>'
        self._parts.append(f'<div class="card">{bar_html}</div>')

    def charts(self, charts: Iterable[Chart]) -> None:
        """Add charts, side by side if the page is wide enough; a `wide` chart has its own row."""
        rendered = [_chart(chart) for chart in charts if any(_has_points(series) for series in chart.series)]
        if rendered:
            self._has_charts = True
            self._parts.append(f'<div class="charts">{"".join(rendered)}</div>')

    def table(self, header: Sequence[str], rows: Iterable[Sequence[Any]], long: Iterable[str] = ()) -> None:
        """Add a table; the cells of columns named in `long` may wrap."""
        wraps = [name in set(long) for name in header]
        head = "".join(f"<th>{_text(name)}</th>" for name in header)
        body = []
        for row in rows:
            cells = (
                f"<td{' class=long' if wrap else ''}>{_text(cell)}</td>" for cell, wrap in zip(row, wraps, strict=True)
            )
            body.append(f"<tr>{''.join(cells)}</tr>")
        table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
        self._parts.append(f'<div class="scroll"><table>{table}</table></div>')

    def pictures(self, pictures: Iterable[tuple[str, str, bytes]]) -> None:
        """Add PNG images side by side, embedded in the page: (caption, alternative text, bytes of the file)."""
        figures = []
        for caption, words, content in pictures:
            source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            image = f'<img src="{source}" alt="{_text(words)}">'
            figures.append(f'<figure class="card">{image}<figcaption>{_text(caption)}</figcaption></figure>')
        self._parts.append(f'<div class="pictures">{"".join(figures)}</div>')

    def preformatted(self, text: str, prose: bool = False) -> None:
        """Add a preformatted text; with `prose`, long lines wrap."""
        self._parts.append(f"<pre{' class=prose' if prose else ''}>{_text(text)}</pre>")

    def render(self) -> str:
        """The page's HTML; it embeds the plotting library if the page has a chart."""
        subtitle = f'<p class="subtitle">{_text(self.subtitle)}</p>' if self.subtitle else ""
        scripts = ""
        if self._has_charts:
            scripts = (
                f'{self._axes}<script type="application/octet-stream" id="plotly">{_library()}</script>\n'
                f"<script>{_asset('page.js')}</script>\n"
            )
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_text(self.title)}</title>\n<style>{_asset('page.css')}</style>\n</head>\n<body>\n<main>\n"
            f"<header><h1>{_text(self.title)}</h1>{subtitle}</header>\n"
            + "\n".join(self._parts)
            + f"\n</main>\n{scripts}</body>\n</html>\n"
        )


def _text(value: Any) -> str:
    return html.escape("" if value is None else str(value), quote=True)


def _asset(name: str) -> str:
    return resources.files("bigtrain.tracking").joinpath(name).read_text(encoding="utf-8")


def _library() -> str:
    """The gzip-compressed basic bundle of plotly.js in base64, which the page decompresses (1.2 MB uncompressed)."""
    packed = resources.files("bigtrain.tracking").joinpath("plotly-basic.min.js.gz").read_bytes()
    return base64.b64encode(packed).decode()


def _json(value: Any) -> str:
    # "<" is escaped, since "</script>" in a script element would end the element.
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _has_points(series: Series) -> bool:
    return bool(np.isfinite(np.asarray(series.y, dtype=np.float64)).any())


def _numbers(values: npt.NDArray[np.float64]) -> list[float | int]:
    return [int(value) if value == math.floor(value) else float(f"{value:.6g}") for value in values.tolist()]


def _chart(chart: Chart) -> str:
    series = []
    for one in chart.series:
        if _has_points(one):
            order = np.argsort(np.asarray(one.x, dtype=np.float64), kind="stable")
            x, y = downsample(np.asarray(one.x)[order], np.asarray(one.y)[order])
            # Plotly interprets names as a subset of HTML, so they are escaped like any text.
            spec_of_one: dict[str, Any] = {
                "name": _text(one.name), "x": _numbers(x), "y": _numbers(y), "color": one.color,
                "faint": one.faint, "markers": one.markers, "points": one.points, "dashed": one.dashed,
                "ramp": one.ramp, "unnamed": one.unnamed, "smoothing": one.smoothing,
            }  # fmt: skip
            if one.band is not None:
                low, high = (downsample(one.x, end) for end in one.band)
                spec_of_one |= {"band": [_numbers(low[0]), _numbers(low[1]), _numbers(high[0]), _numbers(high[1])]}
            series.append(spec_of_one)
    marks = [{"x": mark.x, "text": _text(mark.text), "color": mark.kind} for mark in chart.marks]
    spec = {
        "series": series, "marks": marks, "x_title": _text(chart.x_title), "log_x": chart.log_x,
        "log_y": chart.log_y, "format": chart.value_format, "tick_format": chart.tick_format,
        "from_zero": chart.from_zero,
    }  # fmt: skip
    data = _json(spec)
    unit = f" <span>{_text(chart.unit)}</span>" if chart.unit else ""
    return (
        f'<section class="card{" wide" if chart.wide else ""}">'
        f'<div class="bar"><h3>{_text(chart.title)}{unit}</h3>'
        f"{_scale_switch(chart) if chart.log_switch else ''}</div>"
        f'<div class="plot"></div><script type="application/json">{data}</script></section>'
    )


def _scale_switch(chart: Chart) -> str:
    return _switch("scale of y", ["linear", "log"], "log" if chart.log_y else "linear", name="scale")


def _switch(label: str, values: Iterable[str], chosen: str, name: str = "") -> str:
    buttons = []
    for value in values:
        pressed = "true" if value == chosen else "false"
        buttons.append(f'<button type="button" value="{_text(value)}" aria-pressed="{pressed}">{_text(value)}</button>')
    kind = name or f"scale {label}"
    return f'<div class="{kind}" role="group" aria-label="{label}">{"".join(buttons)}</div>'
