"""compare.html: the multiplier between two recipes in each cell, over the whole ladder and at the target."""

from __future__ import annotations

from typing import Any

from bigtrain.scaling.runs.numbers import count, nats
from bigtrain.tracking.page import Chart, Fact, Page, Series

COSTS = {"flops": "FLOPs", "tokens": "tokens", "time": "measured time"}


def compare_page(found: dict[str, Any]) -> str:
    """The HTML page of a comparison.

    Args:
        found: The result of `compare.compare`, with the `names` of both recipes.
    """
    ladder, target, points = found["ladder"], found["target"], found["points"]
    first, second = found["names"]
    made = Page(
        title=f"{second} over {first}",
        subtitle=f"{found['runs'][0]} and {found['runs'][1]} runs, {'paired' if found['paired'] else 'not paired'}, at "
        f"equal {COSTS[found['cost']]}",
    )
    made.headline([
        Fact("Multiplier over the ladder", f"{ladder['value']:.3f}", _span(ladder)),
        Fact(f"At {target['flops']:.3g} FLOPs", f"{target['value']:.3f}", f"{_span(target)}, extrapolated"),
        Fact("The difference is", "resolved" if found["resolved"] else "not resolved", f"{found['clusters']} clusters"),
    ])  # fmt: skip
    scaled = "L_A(N, D m)" if found["cost"] == "tokens" else "L_A(N m^1/2, D m^1/2)"
    made.note(
        f"L_B(N, D) = {scaled}: {first} needs m times the {COSTS[found['cost']]} of {second} for the same loss. "
        "Intervals: 95 %."
    )
    if found["advice"]:
        made.note(f"{found['advice'][0].upper()}{found['advice'][1:]}.")
    flops = [point["flops"] for point in points]
    ends = [flops[0], flops[-1]]
    axis = "measured time" if found["cost"] == "time" else "FLOPs"
    band = ([ladder["interval"][0]] * 2, [ladder["interval"][1]] * 2)
    made.charts([
        Chart("Multiplier by run", [
            Series("a cell of the ladder", flops, [point["multiplier"] for point in points], 1, points=True),
            Series("over the ladder, 95 %", ends, [ladder["value"]] * 2, 2, band=band),
            Series("equal", ends, [1.0, 1.0], 3, dashed=True),
        ], "times", axis, wide=True, log_x=True, value_format=".3f"),
        Chart("Loss", [
            Series(first, flops, [point["loss"][0] for point in points], 3, points=True),
            Series(second, flops, [point["loss"][1] for point in points], 2, points=True),
        ], "nats per token", axis, wide=True, log_x=True, log_y=True,
            value_format=".5f"),
    ])  # fmt: skip
    made.table(
        [f"N of {first}", f"N of {second}", "D", f"loss of {first}", f"loss of {second}", "runs", "multiplier"],
        [[count(p["params"][0]), count(p["params"][1]), count(p["tokens"]), nats(p["loss"][0]), nats(p["loss"][1]),
          f"{p['runs'][0]} and {p['runs'][1]}", f"{p['multiplier']:.3f}"] for p in points],
    )  # fmt: skip
    return made.render()


def _span(one: dict[str, Any]) -> str:
    low, high = one["interval"]
    return f"{low:.3f} to {high:.3f}"
