"""Compute multipliers of one recipe over another, and what a pair of ladders is expected to say."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config import UserError
from bigtrain.scaling.compare import compare
from bigtrain.scaling.runs.table import RunTable
from bigtrain.sweeps.config import ExpectedConfig
from bigtrain.sweeps.design import regular_grid
from bigtrain.sweeps.pairs import expect_pair
from tests.bench.scaling_compare import RATIOS, SEEDS, SIZES, ladder

Command = Callable[..., subprocess.CompletedProcess[str]]


def two(multiplier: float, paired: bool = True, draw: int = 0) -> tuple[RunTable, RunTable]:
    generator = np.random.default_rng(draw)
    noise = generator.normal(size=(2, len(SIZES), SEEDS))
    first = ladder(1.0, 0, noise[0], generator)
    return first, ladder(multiplier, 0 if paired else SEEDS, noise[0 if paired else 1], generator)


@pytest.mark.parametrize("multiplier", [1.0, 1.02, 1.5])
def test_a_planted_multiplier_is_held_and_pairs_are_narrower(multiplier: float) -> None:
    paired, unpaired = (compare(*two(multiplier, pair, draw=1), None, "flops", None) for pair in (True, False))
    assert paired["paired"]
    assert not unpaired["paired"]
    widths = []
    for found in (paired, unpaired):
        low, high = found["ladder"]["interval"]
        assert low <= multiplier <= high
        widths.append(np.log(high / low))
    assert widths[0] < 0.6 * widths[1]
    assert paired["resolved"] is (multiplier > 1)
    if multiplier == 1.0:
        assert "seeds" in paired["advice"] or "as good as equal" in paired["advice"]


@pytest.mark.parametrize("draw", [1, 2, 3])
def test_two_sizes_are_enough_for_a_large_multiplier(draw: int) -> None:
    """With two sizes the law has one exponent; one in C alone, which ignores D/N, would say 1.48."""
    generator = np.random.default_rng(draw)
    noise = generator.normal(size=(2, SEEDS))
    found = compare(ladder(1.0, 0, noise, generator), ladder(1.5, 0, noise, generator), None, "flops", None)
    assert found["ladder"]["value"] == pytest.approx(1.5, rel=0.012)
    for name in ("ladder", "target"):
        low, high = found[name]["interval"]
        assert low <= 1.5 <= high


def test_higher_flops_count_against_a_recipe_at_equal_flops_and_not_at_equal_tokens() -> None:
    first, second = two(1.1)
    costly = replace(second, flops=1.1 * second.flops)
    flops, tokens = (compare(first, costly, None, cost, None)["ladder"]["value"] for cost in ("flops", "tokens"))  # type: ignore[arg-type]
    assert flops == pytest.approx(1.0, abs=0.02)
    assert tokens > 1.05
    with pytest.raises(UserError, match="measured times"):
        compare(first, second, None, "time", None)


@pytest.mark.parametrize("longer", [1.0, 1.25])
def test_recipes_of_slightly_other_sizes_are_compared_at_one_length_or_one_ratio(longer: float) -> None:
    first, second = two(1.0)
    other = replace(second, params=1.25 * second.params, tokens=longer * second.tokens)
    found = compare(first, other, None, "tokens", None)
    assert found["cells"] == len(SIZES) * len(RATIOS)
    with pytest.raises(UserError, match="in common"):
        compare(first, replace(other, tokens=1.12 * other.tokens), None, "tokens", None)


def test_ladders_without_common_runs_are_refused() -> None:
    first, second = two(1.0)
    with pytest.raises(UserError, match="in common"):
        compare(first, replace(second, tokens=3.3 * second.tokens), None, "flops", None)
    with pytest.raises(UserError, match="in common"):
        compare(first, replace(second, params=1.4 * second.params), None, "flops", None)
    with pytest.raises(UserError, match="share size, length and seed"):
        compare(*two(1.0, paired=False), None, "flops", True)


def test_the_command_writes_a_table_and_a_page(bigtrain: Command, tmp_path: Path) -> None:
    for name, table in zip("ab", two(1.5), strict=True):
        lines = ["N,D,loss,seed"]
        rows = zip(table.params.tolist(), table.tokens.tolist(), table.loss.tolist(), table.seed, strict=True)
        lines += [f"{n!r},{d!r},{loss!r},{seed}" for n, d, loss, seed in rows]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    done = bigtrain("scaling", "compare", tmp_path / "a.csv", tmp_path / "b.csv", "--out", tmp_path / "c", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["resolved"]
    assert json.loads((tmp_path / "c/compare.json").read_text())["ladder"] == found["ladder"]
    assert f"{found['ladder']['value']:.3f}" in (tmp_path / "c/compare.html").read_text()


def test_a_planned_pair_is_as_wide_as_a_simulated_one() -> None:
    grid = regular_grid([int(size) for size in SIZES], RATIOS.tolist(), SEEDS)
    planned = expect_pair(grid, ExpectedConfig())
    widths = [
        np.median([np.divide(*compare(*two(1.0, pair, draw), None, "flops", None)["ladder"]["interval"][::-1]) - 1
                   for draw in range(6)])
        for pair in (True, False)
    ]  # fmt: skip
    assert planned.paired_width == pytest.approx(widths[0], rel=0.4)
    assert planned.unpaired_width == pytest.approx(widths[1], rel=0.4)
