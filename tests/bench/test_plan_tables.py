"""The planner on measured runs of others: test rows stay within the bands, and calibration saw none of them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.bench.plan_calibrate import TABLES, rows_of
from tests.bench.plan_rows import DIVISION, REFERENCE, read
from tests.bench.plan_tables import summary

MEDIAN, P90 = 0.056, 0.15
"""SimuMax's own median; 5 % of the others is printed, and asserted with the same bound."""


def test_the_division_leaves_out_whole_models_or_gpu_counts() -> None:
    for table in ("vtrain_single", "vtrain_multi"):
        sides: dict[tuple[int, int, int], set[bool]] = {}
        for row in rows_of(table):
            sides.setdefault((row.model.width, row.model.layers, row.sizes.world_size), set()).add(row.calibrates)
        assert all(len(side) == 1 for side in sides.values())
        assert {side for one in sides.values() for side in one} == {True, False}
    assert set(DIVISION) == set(TABLES)


def test_a_table_of_another_form_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([["a", "b"], [1, 2]])
    with pytest.raises(ValueError, match="columns of no table"):
        list(read(file))


@pytest.mark.parametrize("table", ["throughput_tables", "simumax_b200", "vtrain_multi"])
def test_predictions_of_test_rows_stay_within_the_bands(table: str) -> None:
    for entry in summary(list(read(REFERENCE / f"{table}.csv"))):
        if entry["side"] == "test":
            assert entry["planner"]["median"] <= MEDIAN, entry
            assert entry["planner"]["median"] < entry["constant"]["median"], entry
            if table != "vtrain_multi":
                assert entry["planner"]["p90"] <= P90, entry
