"""Charts of points and lines as SVG, written directly: they need no library, and a README can show them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

TEXT, QUIET, GRID = "#1c1d1f", "#63666d", "#e3e3e0"


@dataclass(frozen=True)
class Axes:
    """Two logarithmic axes of a chart, and the box in pixels that they span."""

    x: tuple[float, float]
    """Range in the data's units, likewise `y`."""
    y: tuple[float, float]
    left: float
    right: float
    top: float
    bottom: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Coordinates in pixels of a point of the data."""
        across = math.log(x / self.x[0]) / math.log(self.x[1] / self.x[0])
        up = math.log(y / self.y[0]) / math.log(self.y[1] / self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)


def picture(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    """The content of an SVG file.

    Args:
        title: Title for screen readers.
        width, height: Size in pixels.
        parts: SVG elements.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{TEXT}" role="img">\n'
        f"<title>{html.escape(title)}</title>\n"
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def polyline(points: Sequence[tuple[float, float]], color: str, width: float) -> str:
    """A line through points, given in pixels."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"/>'


def label(x: float, y: float, text: str, color: str = TEXT, anchor: str = "start") -> str:
    """Text at a point, given in pixels."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}">{html.escape(text)}</text>'
