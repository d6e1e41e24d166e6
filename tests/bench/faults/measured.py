"""What is promised of faults, what was measured, and the lines that say both."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Final, NamedTuple


class Promise(NamedTuple):
    """One line of the table."""

    what: str
    most: float | None
    """What is promised; None where a bound comes with each value, or nothing is promised."""
    unit: str
    of: str
    """Of what it is promised: each value, or the median of all."""


SAVE_EVERY: Final = 20
"""Steps between two saves of the runs here."""
ONE_INTERVAL: Final = f"{SAVE_EVERY} steps, and those of one save"
"""A save is written while steps go on: a fault meanwhile finds the one before it."""

PROMISES: Final = {
    "P1": Promise("a killed rank is seen", 2.0, "s", "each"),
    "P2": Promise("a hang is seen, beyond its limit", 5.0, "s", "each"),
    "P3 killed": Promise("a killed node is seen", 15.0, "s", "each"),
    "P3 silent": Promise("a silent node is seen", 15.0, "s", "each"),
    "P4 fault": Promise("steps lost to a fault", None, ONE_INTERVAL, "each"),
    "P4 stop": Promise("steps lost to a stop", 0.0, "steps", "each"),
    "P4 notice": Promise("steps lost to a drain with 20 s notice", 0.0, "steps", "each"),
    "P4 growth": Promise("steps lost when it takes more nodes", 0.0, "steps", "each"),
    "P7": Promise("left behind after a fault", 0.0, "things", "each"),
    "P8 hangs": Promise("a step beside W&B that hangs", 1.05, "of a step without", "median"),
    "P8 down": Promise("a step beside W&B that is away", 1.05, "of a step without", "median"),
    "P8 full": Promise("a step beside W&B's full disk", 1.05, "of a step without", "median"),
    "P10 rank": Promise("from a rank's death to the next step", 8.0, "s", "median"),
    "P10 node": Promise("from a node's death to the next step", 25.0, "s", "median"),
    "P10 fewer": Promise("the same, on one node fewer", 25.0, "s", "median"),
    "notice": Promise("from a drain's notice to the next step", None, "s", "each"),
}


@dataclass
class Measured:
    """The values of one line, and of the parts that they consist of."""

    values: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    bounds: list[float] = field(default_factory=list)
    """What was allowed of each value, where that differs."""
    found: list[str] = field(default_factory=list)
    """What must not be there and was."""

    def add(self, value: float, bound: float | None = None) -> None:
        """One more value."""
        self.values.append(value)
        if bound is not None:
            self.bounds.append(bound)

    def add_parts(self, **parts: float) -> None:
        """The parts of one more value."""
        for name, value in parts.items():
            self.parts.setdefault(name, []).append(value)


Results = dict[str, Measured]


def table(results: Results) -> tuple[list[str], bool]:
    """Lines for a person, and whether all promises were kept."""
    lines, kept = [], True
    for name, measured in results.items():
        if not measured.values:
            continue
        good = _kept(PROMISES[name], measured)
        kept &= good is not False
        lines.append(f"{name:10} {PROMISES[name].what:38} {_distribution(measured.values)}  {_promised(name, good)}")
        if measured.parts:
            parts = (f"{part} {statistics.median(values):.2f}" for part, values in measured.parts.items())
            lines.append(f"{'':10} medians of its parts: {', '.join(parts)}")
        lines += [f"{'':10} found: {thing}" for thing in measured.found]
    return lines, kept


def _kept(promise: Promise, measured: Measured) -> bool | None:
    if measured.bounds:
        return all(value <= bound for value, bound in zip(measured.values, measured.bounds, strict=True))
    if promise.most is None:
        return None
    worst = statistics.median(measured.values) if promise.of == "median" else max(measured.values)
    return worst <= promise.most


def _distribution(values: list[float]) -> str:
    ordered = sorted(values)
    digits = 0 if all(value == int(value) for value in values) else 2
    shown = (statistics.median(ordered), ordered[0], ordered[-1])
    middle, least, most = (f"{value:7.{1 if digits == 0 and value != int(value) else digits}f}" for value in shown)
    return f"n {len(values):3}  median {middle}  least {least}  most {most}"


def _promised(name: str, good: bool | None) -> str:
    _, most, unit, of = PROMISES[name]
    if good is None:
        return f"{unit}, nothing promised"
    amount = unit if most is None else f"{most:g} {unit}"
    return f"promised {amount} ({of}): {'kept' if good else 'BROKEN'}"
