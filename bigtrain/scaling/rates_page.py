"""rates.html: the optima of the learning rate and the batch, their parabolas, and the laws fitted to them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bigtrain.scaling.rates import NAMES, PowerLaw, Setting
from bigtrain.scaling.runs.numbers import count, nats
from bigtrain.tracking.page import Chart, Fact, Page, Series

LETTERS = {"params": "N", "tokens": "D", "batch": "B", "loss": "L"}
_PATH = 40
_CURVES = 12
"""Largest number of grids that a chart shows."""


def rates_page(found: dict[str, Any]) -> str:
    """The HTML page of rate laws.

    Args:
        found: The content of rates.json; see `decide.fit_rates`.
    """
    made = Page(title="Learning rate and batch", subtitle=f"optima of swept runs from {found['source']}")
    facts = []
    for setting, one in found["laws"].items():
        ends = one["law"]["exponents"]
        for name in one["law"]["names"]:
            low, high = ends[name]["interval"]
            facts.append(Fact(f"Best {NAMES[setting]} grows as", f"{LETTERS[name]}^{ends[name]['value']:.3f}",
                              f"{low:.3f} to {high:.3f}, 95 %"))  # fmt: skip
    made.headline(facts)
    for note in found["notes"]:
        made.note(f"{note[0].upper()}{note[1:]}.")
    for setting, one in found["laws"].items():
        made.heading(f"The {NAMES[setting]}")
        made.note(f"{law_text(setting, one['law'])}. One optimum lies within {one['law']['deviation']:.1%} of it.")
        made.charts([_grids(setting, one["optima"]), _law_chart(setting, one)])
        made.table(
            ["N", "D", "B", f"best {NAMES[setting]}", "by the law", "loss", "values tried", ""],
            [_row(optimum, one["law"]) for optimum in one["optima"]], long=("",),
        )  # fmt: skip
    return made.render()


def law_text(setting: Setting, plain: dict[str, Any]) -> str:
    """A law as one formula: "learning rate* = 0.0041 (N / 1.2M)^-0.31"."""
    terms = [f"({LETTERS[name]} / {count(plain['means'][name])})^{plain['exponents'][name]['value']:.3f}"
             for name in plain["names"]]  # fmt: skip
    return f"{NAMES[setting]}* = {count(plain['value_at_means'], 4)} {' '.join(terms)}"


def _row(optimum: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    by_law = "n/a"
    if optimum["loss"] is not None:
        at = PowerLaw.parse(plain).at(**{name: float(optimum[name]) for name in plain["names"]})
        by_law = f"{at['value']:.3g} [{at['interval'][0]:.3g}, {at['interval'][1]:.3g}]"
    best = f"{optimum['value']:.3g}" if not optimum["refused"] else "none"
    return [
        count(optimum["params"]), count(optimum["tokens"]), count(optimum["batch"]) if optimum["batch"] else "", best,
        by_law, nats(optimum["loss"] or math.nan),
        f"{len(optimum['tried'])}, {optimum['tried'][0]:.3g} to {optimum['tried'][-1]:.3g}", optimum["refused"],
    ]  # fmt: skip


def _grids(setting: Setting, optima: list[dict[str, Any]]) -> Chart:
    series = []
    shown = optima[:: max(1, math.ceil(len(optima) / _CURVES))]
    for i, one in enumerate(shown):
        shade = i / max(len(shown) - 1, 1)
        known = [(x, y) for x, y in zip(one["tried"], one["losses"], strict=True) if y is not None]
        name = f"N {count(one['params'])}, D {count(one['tokens'])}"
        named = i in (0, len(shown) // 2, len(shown) - 1)
        series.append(Series(name, [x for x, _ in known], [y for _, y in known], points=True, ramp=shade,
                             unnamed=not named))  # fmt: skip
        if one["parabola"]:
            x = np.geomspace(one["value"] / 3, one["value"] * 3, _PATH)
            x = x[(x >= one["tried"][0]) & (x <= one["tried"][-1])]
            series.append(Series("parabola", x, np.polyval(one["parabola"], np.log(x)), ramp=shade, unnamed=True))
    return Chart(f"Loss by {NAMES[setting]}", series, "nats per token", NAMES[setting], wide=True, log_x=True,
                 value_format=".5~g")  # fmt: skip


def _law_chart(setting: Setting, found: dict[str, Any]) -> Chart:
    """A chart of the optima and the law against the law's first variable, with other variables at their means."""
    law, plain = PowerLaw.parse(found["law"]), found["law"]
    name = law.names[0]
    good = [one for one in found["optima"] if not one["refused"]]
    x = np.geomspace(*law.spans[0], _PATH)
    along = [law.at(**{**plain["means"], name: float(value)}) for value in x]
    band = ([one["interval"][0] for one in along], [one["interval"][1] for one in along])
    return Chart(
        f"Best {NAMES[setting]} against {LETTERS[name]}",
        [Series("optima", [one[name] for one in good], [one["value"] for one in good], 1, points=True),
         Series("law, 95 %", x, [one["value"] for one in along], 2, band=band)],
        NAMES[setting], LETTERS[name], wide=True, log_x=True, log_y=True, value_format=".3~g",
    )  # fmt: skip
