"""Fits the planner's constants to the calibration rows: `python -m tests.bench.plan_calibrate`, which rewrites
rates.yaml.

A set of constants belongs to a GPU and a program. Each is a rate of one physical thing (`hardware.cluster.Rates`, and
the latency of a link); those that too few rows could tell apart are fixed to values that are printed beside the
fitted ones.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import yaml
from scipy.optimize import least_squares

from bigtrain.hardware.cluster import Cluster, Rates, cluster
from bigtrain.planning.step import Step
from tests.bench.plan_memory import candidates
from tests.bench.plan_rows import REFERENCE, Row, read, step_of

RATES = REFERENCE / "rates.yaml"
BOUNDS = {
    "matmul": (0.3, 1.0, 0.75),
    "attention": (0.1, 0.95, 0.5),
    "memory": (0.2, 1.0, 0.8),
    "link": (0.1, 1.0, 0.8),
    "network": (0.05, 1.0, 0.7),
    "launch_s": (0.5e-6, 100e-6, 10e-6),
    "pass_s": (0.0, 0.05, 0.5e-3),
    "interference": (0.0, 1.0, 0.1),
    "latency_s": (0.1e-6, 80e-6, 10e-6),
}
"""Lowest, highest, and where a fit starts."""
TABLES = ("throughput_tables", "vtrain_single", "vtrain_multi", "simumax_b200")


@dataclass(frozen=True)
class Fit:
    """Which constants a GPU and program have."""

    fitted: tuple[str, ...]
    fixed: dict[str, float] = field(default_factory=dict)
    base: str | None = None
    """Another GPU and program, fitted before, that gives all constants but the fitted ones."""


KERNEL = {"launch_s": 8e-6, "latency_s": 10e-6}
"""Of large models, in whose steps both are small."""
FITS = {
    "a100-mpt": Fit(("matmul", "attention", "memory", "link", "network", "launch_s", "interference")),
    "h100-mpt": Fit(("matmul", "attention", "memory", "link", "network", "launch_s", "interference")),
    "a100-vtrain": Fit(("matmul", "memory", "link", "launch_s", "pass_s", "latency_s")),
    "a100-megatron": Fit(("matmul", "memory", "link", "network"), KERNEL),
    "a100-vtrain-cluster": Fit(("network",), base="a100-megatron"),
    "h100-megatron": Fit(("matmul", "network"), {**KERNEL, "attention": 0.4, "memory": 0.6, "link": 0.8}),
    "h100-torchtitan": Fit(("matmul", "memory"), {**KERNEL, "attention": 0.4, "interference": 0.3}),
    "b200-megatron": Fit(("matmul", "attention", "memory", "link"), KERNEL),
}


def machine(name: str, constants: dict[str, float]) -> Cluster:
    """The entry of a GPU with some constants."""
    entry = cluster(name.split("-")[0])
    rates = {key: value for key, value in constants.items() if key != "latency_s"}
    inside = entry.inside
    if "latency_s" in constants:
        inside = inside.model_copy(update={"latency_s": constants["latency_s"]})
    return entry.model_copy(update={"rates": Rates(**rates), "inside": inside})


@cache
def steps(row: Row) -> tuple[Step, ...]:
    """One for each choice of what a row does not print."""
    return tuple(step_of(one) for one in candidates(row))


def predicted_s(row: Row, on: Cluster) -> float:
    """The step's time: the fastest, where inputs are searched."""
    if row.network_bytes_per_s is not None:
        between = on.between.model_copy(update={"bytes_per_s": row.network_bytes_per_s})
        on = on.model_copy(update={"between": between})
    return min(step.seconds(on).total for step in steps(row))


def rows_of(table: str) -> list[Row]:
    """The rows of one of the committed tables."""
    return list(read(REFERENCE / f"{table}.csv"))


def fit(name: str, rows: list[Row], fixed: dict[str, float]) -> dict[str, float]:
    """The constants of a GPU and program from its calibration rows, by a robust loss of log ratios."""
    how = FITS[name]
    lowest, highest, start = (np.array([BOUNDS[key][at] for key in how.fitted]) for at in range(3))

    def constants(z: Any) -> dict[str, float]:
        values = lowest + (highest - lowest) / (1 + np.exp(-z))
        return fixed | dict(zip(how.fitted, values.tolist(), strict=True))

    def residuals(z: Any) -> Any:
        on = machine(name, constants(z))
        return np.array([math.log(predicted_s(row, on) / row.measured_s) for row in rows])

    first = np.log((start - lowest) / (highest - start))
    found = least_squares(residuals, first, loss="soft_l1", f_scale=0.05, max_nfev=40, diff_step=1e-2)
    return {key: float(f"{value:.4g}") for key, value in constants(found.x).items()}


def main(names: list[str]) -> None:
    """Fit some, or all, print, and write rates.yaml."""
    rows = [row for table in TABLES for row in rows_of(table) if row.calibrates]
    found = yaml.safe_load(RATES.read_text()) if names else {}
    for name in names or FITS:
        own = [row for row in rows if row.rates == name]
        how = FITS[name]
        found[name] = fit(name, own, found[how.base] if how.base else how.fixed)
        print(f"{name}: {len(own)} rows, fitted {', '.join(FITS[name].fitted)}: {found[name]}")
    head = "# Written by `python -m tests.bench.plan_calibrate` from the calibration rows of division.yaml alone.\n"
    RATES.write_text(head + yaml.safe_dump(found, sort_keys=False, default_flow_style=None, width=120))


if __name__ == "__main__":
    main(sys.argv[1:])
