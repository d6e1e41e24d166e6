"""The published fits, by the command a person runs; tolerances are those of the publications' own digits."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]

EXPONENT, FLOOR, FACTOR, DEVIATION = 5e-4, 1e-3, 0.01, 0.1
"""Absolute for exponents and E; relative for A and B, and for standard errors."""
POINTS = "chinchilla_points/svg_extracted_data.csv"
HOT, CURVES = "gemstones_hot/hot.jsonl", "gemstones_hot/hot_477_with_flops.csv"
ISOFLOP = "llama3_isoflop/isoflops_points.csv"


def fitted(bigtrain: Command, real_data: Path, file: str, *options: object) -> dict[str, Any]:
    done = bigtrain("scaling", "fit", real_data / "scaling" / file, "--out", "law", *options, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout)["approaches"])


@pytest.mark.slow
def test_chinchilla_by_huber_and_the_largest_run_held_out(bigtrain: Command, real_data: Path) -> None:
    one = fitted(bigtrain, real_data, POINTS, "--drop-highest", 5, "--approach", "a3", "--replicates", 100)["a3_huber"]
    assert one["A"] == pytest.approx(477.84, rel=FACTOR)
    assert one["B"] == pytest.approx(2143.86, rel=FACTOR)
    assert one["E"] == pytest.approx(1.81724, abs=FLOOR)
    assert (one["alpha"], one["beta"]) == pytest.approx((0.34731, 0.36718), abs=EXPONENT)
    assert one["objective"] == pytest.approx(0.0010182740, rel=1e-6)
    assert one["search"]["projection_objective"] == pytest.approx(one["objective"], rel=1e-9)
    assert one["search"]["converged_starts"] > 0.5


@pytest.mark.slow
def test_chinchilla_by_l1(bigtrain: Command, real_data: Path) -> None:
    options = ("--drop-highest", 5, "--approach", "a3", "--loss-function", "l1", "--replicates", 100)
    one = fitted(bigtrain, real_data, POINTS, *options)["a3_l1"]
    assert (one["A"], one["B"]) == pytest.approx((482.0, 2085.4), rel=FACTOR)
    assert one["E"] == pytest.approx(1.8168, abs=FLOOR)
    assert (one["alpha"], one["beta"], one["a"]) == pytest.approx((0.3478, 0.3658, 0.5126), abs=EXPONENT)


@pytest.mark.slow
def test_chinchilla_by_squares(bigtrain: Command, real_data: Path) -> None:
    options = ("--drop-highest", 5, "--where", "flops < 1e21", "--approach", "a3", "--loss-function", "squares")
    one = fitted(bigtrain, real_data, POINTS, *options, "--replicates", 100)["a3_squares"]
    assert one["E"] == pytest.approx(1.9051, abs=FLOOR)
    assert one["A"] * 1e6 ** -one["alpha"] == pytest.approx(4.0005, rel=FACTOR)
    assert one["B"] * 1e9 ** -one["beta"] == pytest.approx(1.0509, rel=FACTOR)
    assert (one["alpha"], one["beta"]) == pytest.approx((0.3511, 0.4587), abs=EXPONENT)
    assert one["objective"] == pytest.approx(0.062414, rel=1e-4)


@pytest.mark.slow
def test_chinchilla_standard_errors_point_by_point(bigtrain: Command, real_data: Path) -> None:
    """4,000 replicates: B's distribution has a long tail, and 1,000 give its deviation to no better than 10 %."""
    options = ("--drop-highest", 5, "--approach", "a3", "--cluster", "none", "--replicates", 4000)
    errors = fitted(bigtrain, real_data, POINTS, *options)["a3_huber"]["standard_error"]
    published = {"A": 124.5, "B": 1293, "E": 0.0257, "alpha": 0.0154, "beta": 0.0206, "a": 0.020}
    assert errors == pytest.approx(published, rel=DEVIATION)


@pytest.mark.slow
def test_gemstones_parametric(bigtrain: Command, real_data: Path) -> None:
    one = fitted(bigtrain, real_data, HOT, "--approach", "a3", "--replicates", 100)["a3_huber"]
    assert (one["alpha"], one["beta"]) == pytest.approx((0.2929, 0.7129), abs=EXPONENT)


@pytest.mark.slow
def test_gemstones_envelope(bigtrain: Command, real_data: Path) -> None:
    one = fitted(bigtrain, real_data, CURVES, "--approach", "a1", "--replicates", 100)["a1"]
    assert (one["a"], one["b"]) == pytest.approx((0.4994, 0.4810), abs=EXPONENT)


def test_llama_3_isoflop(bigtrain: Command, real_data: Path) -> None:
    one = fitted(bigtrain, real_data, ISOFLOP, "--approach", "a2", "--replicates", 100)["a2"]
    assert one["b"] == pytest.approx(0.5368, abs=EXPONENT)
    assert one["tokens_coefficient"] == pytest.approx(0.2994, rel=FACTOR)


PORIAN = {0: 0.8353, 1: 0.7065, 2: 0.6020, 3: 0.5715, 4: 0.4969}
"""Exponents of approach 2 by Porian et al. 2024, whose minima are those of an interpolation."""
WINDOW = 0.035


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=pytest.mark.slow if number else []) for number in PORIAN]
)
def test_porian_isoflops(bigtrain: Command, real_data: Path, number: int) -> None:
    (path,) = (real_data / "scaling" / "porian").glob(f"porian_{number}_*.csv")
    one = fitted(bigtrain, real_data, f"porian/{path.name}", "--approach", "a2", "--replicates", 100)["a2"]
    assert one["a"] == pytest.approx(PORIAN[number], abs=WINDOW)
    by_window = {row["window"]: row["a"] for row in one["window_sensitivity"]}
    assert by_window["within 10%"] == one["a"]
    assert by_window["interpolation"] == pytest.approx(PORIAN[number], abs=0.01)
