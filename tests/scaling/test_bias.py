"""Bias of short and small runs: suspected where it is planted, at a known rate where it is not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from bigtrain.scaling import bias
from bigtrain.scaling.batched import project
from bigtrain.scaling.objective import Problem
from tests.bench.scaling_bias import bound, fitted
from tests.bench.scaling_surfaces import TARGET_FACTOR, surface


def suspected(kind: str, number: int, share: float = 0.0) -> list[bias.Bias]:
    base = surface("clean", 0).table
    table = surface(kind, number, share * base.params).table
    clusters = np.arange(len(table))
    return bias.suspected(fitted(table), table.params, table.tokens, clusters, TARGET_FACTOR * float(table.flops.max()))


@pytest.mark.slow
def test_a_long_warm_up_is_suspected_and_a_clean_surface_is_not() -> None:
    """The study in small: `python -m tests.bench.scaling_bias` has 200 surfaces of each kind."""
    assert all(suspected("clean", number, 0.5) for number in range(8))
    assert sum(bool(suspected("clean", number)) for number in range(24)) <= 4


def test_the_suspected_form_names_its_runs_and_refits_without_them() -> None:
    found = suspected("clean", 3, 0.5)[0]
    assert found.form in ("runs of few tokens a parameter", "short runs")
    assert found.standard_errors > 4
    assert 0 < found.runs_left_out < 72 / 2
    assert 0.01 < found.loss_bias < 0.04


def test_three_scores_share_one_level() -> None:
    alike = np.array([[1.0, 1.0, 1.0]]).repeat(400, axis=0) / 20.0
    apart = np.linalg.qr(np.random.default_rng(0).normal(size=(400, 3)))[0]
    one, three = (bias._critical(directions) for directions in (alike, apart))
    assert one == pytest.approx(1.76, abs=0.05)
    assert three == pytest.approx(2.21, abs=0.05)
    few, many = (bias._as_normal(3.0, np.ones(count) / np.sqrt(count), np.arange(count)) for count in (4, 400))
    assert few < 2.2 < 2.9 < many < 3.0


def test_no_test_flags_more_than_the_bound() -> None:
    table = surface("clean", 0).table
    powers = [bound(table, share * table.params) for share in (0.0, 0.125, 0.5)]
    assert powers[0] == pytest.approx(bias.LEVEL)
    assert powers[1] < 0.6 < powers[2]


def test_a_replicate_of_one_size_is_projected_without_a_warning() -> None:
    """Runs of one N leave A/N^alpha and E parallel: their determinant is zero."""
    table = surface("clean", 0).table
    problem = Problem.of(table.params, table.tokens, table.loss)
    same = (table.params == table.params[0]).astype(float)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        starts = project(problem, np.array([same, same * (table.tokens == table.tokens[0]), np.ones(len(table))]))
    assert np.isfinite(starts).all()
