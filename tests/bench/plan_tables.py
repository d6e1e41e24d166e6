"""The planner against measured runs: `python -m tests.bench.plan_tables TABLE... [--layouts] [--brief]`.

Prints each row, then a summary for each source and GPU type, calibration and test rows apart, beside the error of a
constant MFU calibrated on the same rows. A `*` marks inputs that a row does not print: the fastest by prediction among
those that fit the memory is taken, never the best match. TABLE is a CSV file of one of the forms in `reference`.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bigtrain.hardware.cluster import Cluster
from tests.bench.plan_calibrate import RATES, TABLES, machine, predicted_s, rows_of
from tests.bench.plan_layouts import layouts_report
from tests.bench.plan_memory import peak_bytes
from tests.bench.plan_rows import Row, read, skipped

REPORT_RESERVED = ("torchtitan h100",)
"""Groups whose memory is what the allocator holds, not what it has given out."""


@cache
def machine_of(rates: str) -> Cluster:
    """The machine with the committed constants."""
    return machine(rates, yaml.safe_load(RATES.read_text())[rates])


@cache
def constant_mfu(group: str) -> float:
    """The MFU that all rows of a group would have: the median of its calibration rows."""
    rows = [row for table in TABLES for row in rows_of(table) if row.group == group and row.calibrates]
    return statistics.median(row.mfu_flops / row.measured_s for row in rows)


@cache
def reserved_share(group: str) -> float:
    """What a group's allocator reserves for a byte that is allocated: the geometric mean of its calibration rows.

    1 where rows report what is allocated, as SimuMax's do. torchtitan prints what its allocator has reserved
    (`max_memory_reserved`), which includes the gaps between allocations.
    """
    if group not in REPORT_RESERVED:
        return 1.0
    rows = [row for table in TABLES for row in rows_of(table) if row.group == group and row.calibrates]
    return statistics.geometric_mean(row.peak_bytes / peak_bytes(row) for row in rows if row.peak_bytes)


def predicted_bytes(row: Row) -> float:
    """The peak as the row's source reports it."""
    return peak_bytes(row) * reserved_share(row.group)


def errors(rows: Iterable[Row]) -> tuple[Any, Any]:
    """Relative errors of the planner, and of the constant MFU."""
    rows = list(rows)
    planner = [predicted_s(row, machine_of(row.rates)) / row.measured_s - 1 for row in rows]
    constant = [row.mfu_flops / constant_mfu(row.group) / row.measured_s - 1 for row in rows]
    return np.array(planner), np.array(constant)


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """Errors by group and side of the division."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group, "calibration" if row.calibrates else "test"].append(row)
    found = []
    for (group, side), members in sorted(groups.items()):
        planner, constant = (np.abs(one) for one in errors(members))
        entry: dict[str, Any] = {"group": group, "side": side, "rows": len(members)}
        for name, values in (("planner", planner), ("constant", constant)):
            entry[name] = {"mean": values.mean(), "median": np.median(values), "p90": np.quantile(values, 0.9)}
        peaks = [predicted_bytes(row) / row.peak_bytes - 1 for row in members if row.peak_bytes]
        if peaks:
            entry["memory"] = {"median": float(np.median(np.abs(peaks))), "most": float(np.abs(peaks).max())}
        found.append(entry)
    return found


def print_rows(rows: list[Row]) -> None:
    """One line a row."""
    print(f"{'':11} {'row':62} {'measured':>10} {'predicted':>10} {'error':>7} {'constant':>8}  memory")
    planner, constant = errors(rows)
    for row, error, other in zip(rows, planner, constant, strict=True):
        memory = ""
        if row.peak_bytes:
            peak = predicted_bytes(row)
            memory = (
                f"{row.peak_bytes / 2**30:.1f} GiB, predicted {peak / 2**30:.1f} ({peak / row.peak_bytes - 1:+.1%})"
            )
        label = row.label + ("*" if row.searched else "")
        side = "calibration" if row.calibrates else "test"
        print(
            f"{side:11} {label[:62]:62} {row.measured_s:9.4f}s {row.measured_s * (1 + error):9.4f}s {error:+7.1%} "
            f"{other:+8.1%}  {memory}"
        )


def print_summary(entries: list[dict[str, Any]]) -> None:
    """A table of the summary."""
    head = "constant MFU: mean, median, p90"
    print(
        f"\n{'source and GPU':22} {'side':11} {'rows':>5} {'mean':>7} {'median':>7} {'p90':>7}   {head}   "
        "ratio of medians"
    )
    for entry in entries:
        planner, constant = entry["planner"], entry["constant"]
        numbers = " ".join(f"{planner[key]:7.1%}" for key in ("mean", "median", "p90"))
        others = " ".join(f"{constant[key]:9.1%}" for key in ("mean", "median", "p90"))
        ratio = planner["median"] / constant["median"] if constant["median"] else float("nan")
        memory = (
            f"   memory: median {entry['memory']['median']:.1%}, most {entry['memory']['most']:.1%}"
            if "memory" in entry
            else ""
        )
        print(f"{entry['group']:22} {entry['side']:11} {entry['rows']:5} {numbers}   {others}   {ratio:.2f}{memory}")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--layouts", action="store_true", help="Also compare choices of layouts.")
    parser.add_argument("--brief", action="store_true", help="Print the summary alone.")
    options = parser.parse_args()
    rows = []
    for path in options.tables:
        found = list(read(path))
        rows += found
        for why, count in skipped(path).items():
            print(f"{path.name}: {count} rows skipped: {why}")
        if not options.brief:
            print_rows(found)
    print_summary(summary(rows))
    if options.layouts:
        print()
        print("\n".join(layouts_report(rows, machine_of)))


if __name__ == "__main__":
    main()
