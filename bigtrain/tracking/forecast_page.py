"""The section of the report that compares a run with its forecast: a chart with the band, and a table."""

from __future__ import annotations

from typing import Any

from bigtrain.tracking.page import Chart, Page, Series

_STATES = {
    "waiting": "The run is too short so far to be compared with its forecast.",
    "inside": "The run is inside the band of its forecast.",
    "left": "The run has left the band of its forecast.",
    "changed": "The forecast is not the one that the run was started with: its hash differs from that in run.json.",
}


def show_forecast(page: Page, held: dict[str, Any]) -> None:
    """Add the section to a report's page.

    Args:
        page: The page of the report.
        held: The result of `bigtrain.tracking.forecast.held_against`.
    """
    page.heading("Forecast")
    page.note(_STATES[held["state"]])
    points = held["points"]
    if points:
        tokens = [point["tokens"] for point in points]
        band = ([point["low"] for point in points], [point["high"] for point in points])
        page.charts([
            Chart("Loss beside its forecast", [
                Series("forecast, and band", tokens, [point["loss"] for point in points], 2, band=band),
                Series("training loss", tokens, [point["measured"] for point in points], 1, points=True),
            ], "nats per token", "tokens", wide=True, log_switch=True, value_format=".5f"),
        ])  # fmt: skip
    rows = []
    if final := held["final"]:
        ends = " to ".join(f"{end:.5f}" for end in final["interval"])
        where = "inside" if final["inside"] else "OUTSIDE"
        numbers = f"{final['measured']:.5f}", f"{final['error']:+.2%}"
        rows.append(["held-out loss at the end", f"{final['predicted']:.5f}", ends, *numbers, where])
    if left := held["left"]:
        rows.append([f"{left['what']} from step {left['step']}", "", f"{left['low']:.5f} to {left['high']:.5f}",
                     f"{left['measured']:.5f}", "", "OUTSIDE"])  # fmt: skip
    if points:
        outside = sum(point["outside"] for point in points)
        rows.append(["averages of the training loss", "", "", "", "", f"{outside} of {len(points)} outside"])
    if rows:
        page.table(["", "Forecast", "Band", "Measured", "Error", ""], rows)
