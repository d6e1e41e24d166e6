"""Laws of the best learning rate and batch from swept runs, and what a plan proposes from them."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config import UserError
from bigtrain.scaling.decide import fit_rates, read_rates
from bigtrain.scaling.rates import optima, rate_laws
from bigtrain.scaling.runs.columns import ColumnNames
from bigtrain.scaling.runs.readers import read_source
from bigtrain.sweeps.journal import SweepDirectory
from bigtrain.sweeps.ladder import Rung
from bigtrain.sweeps.proposals import proposal_lines, propose

Command = Callable[..., subprocess.CompletedProcess[str]]
Rows = list[dict[str, object]]
RATES = 2.0 ** np.arange(-13, -1)
BATCHES = 2.0**16 * 2.0 ** np.arange(-4, 6)
RATE_EXPONENTS = {"params": -0.33, "tokens": -0.12, "batch": 0.4}
BATCH_EXPONENT = 0.33


def best_rate(n: float, d: float, b: float) -> float:
    return float(3e-3 * (n / 1e8) ** -0.33 * (d / 2e9) ** -0.12 * (b / 2**16) ** 0.4)


def best_batch(d: float) -> float:
    return float(2**16 * (d / 2e9) ** BATCH_EXPONENT)


def swept(
    batches: tuple[float, ...] = (2**15, 2**17), noise: float = 3e-4, diverge: bool = True, draw: int = 2
) -> Rows:
    """Runs over learning rates and batches with a known optimum; rates far too high diverge."""
    generator = np.random.default_rng(draw)
    rows: Rows = []
    for n in (2e7, 6e7, 2e8):
        for ratio in (10.0, 30.0):
            for b in batches:
                d = n * ratio
                for lr in RATES.tolist():
                    off = math.log(lr / best_rate(n, d, b))
                    loss = 2.0 + 30 * n**-0.2 + 0.02 * off**2
                    loss += 0.01 * math.log(b / best_batch(d)) ** 2 + noise * generator.normal()
                    rows.append({"N": n, "D": d, "batch": b, "lr": lr,
                                 "loss": "nan" if off > 2.5 and diverge else loss})  # fmt: skip
    return rows


def as_columns(rows: Rows) -> dict[str, list[object]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_the_exponents_of_the_learning_rate_are_recovered_with_intervals_that_hold() -> None:
    held = []
    for draw in range(20):
        found = rate_laws(read_source(as_columns(swept(draw=draw))), "refuse")["lr"]
        assert len(found["optima"]) == 12
        for name, truth in RATE_EXPONENTS.items():
            low, high = found["law"]["exponents"][name]["interval"]
            held.append(low <= truth <= high)
            assert high - low < 0.2
    assert np.mean(held) >= 0.85
    for one in found["optima"]:
        assert one["value"] == pytest.approx(best_rate(one["params"], one["tokens"], one["batch"]), rel=0.08)


def test_the_best_batch_follows_the_tokens() -> None:
    rows = swept(tuple(BATCHES.tolist()))
    found = rate_laws(read_source(as_columns(rows)), "refuse")["batch"]
    law = found["law"] if found["by"] == "tokens" else found["others"]["tokens"]
    low, high = law["exponents"]["tokens"]["interval"]
    assert low <= BATCH_EXPONENT <= high


@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_a_best_at_the_edge_is_refused_and_named(end: str) -> None:
    rows = swept(diverge=False)
    cut = [row for row in rows if not (row["N"] == 2e7 and (
        float(str(row["lr"])) < 2 * best_rate(2e7, float(str(row["D"])), float(str(row["batch"])))
        if end == "smallest" else float(str(row["lr"])) > 0.5 * best_rate(2e7, float(str(row["D"])), 2**15)
    ))]  # fmt: skip
    table = read_source(as_columns(cut))
    with pytest.raises(UserError, match=f"N 20M.*is the {end} tried"):
        rate_laws(table, "refuse")
    found = rate_laws(table, "drop")
    assert sum(bool(one["refused"]) for one in found["lr"]["optima"]) == 4
    assert any("not fitted" in note for note in found["notes"])


def test_what_does_not_vary_by_itself_has_no_term() -> None:
    rows = [row for row in swept((2**16,)) if row["D"] == 10 * float(str(row["N"]))]
    found = rate_laws(read_source(as_columns(rows)), "refuse")
    assert found["lr"]["law"]["names"] == ["params"]
    assert any("tokens" in note for note in found["notes"])
    fixed = [row for row in rows if row["lr"] == RATES[3]]
    with pytest.raises(UserError, match="is swept"):
        rate_laws(read_source(as_columns(fixed)), "refuse")


def test_seeds_are_averaged_and_a_hill_is_no_optimum() -> None:
    rows = swept((2**16,), noise=0.0, diverge=False)
    twice = [{**row, "seed": seed, "loss": float(str(row["loss"])) + 0.05 * (seed - 0.5)} for row in rows for seed in
             (0, 1)]  # fmt: skip
    once, both = (optima(read_source(as_columns(one)), "lr") for one in (rows, twice))
    assert [one.value for one in once] == pytest.approx([one.value for one in both])
    hill = [{**row, "loss": 9.0 - float(str(row["loss"]))} for row in rows]
    assert all(one.refused for one in optima(read_source(as_columns(hill)), "lr"))


def test_a_plan_takes_learning_rates_from_a_law(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    rows = swept(tuple(BATCHES.tolist()))
    path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]) + "\n")
    result = fit_rates(str(path), ColumnNames(), None, "refuse", {"params": 4e8, "tokens": 8e9, "batch": 2**17},
                       tmp_path / "rates")  # fmt: skip
    best = result["best"]["lr"]
    assert best["interval"][0] < best_rate(4e8, 8e9, 2**17) < best["interval"][1]
    assert best["outside"] == ["params", "tokens"]
    page = (tmp_path / "rates/rates.html").read_text()
    assert "Best learning rate against N" in page
    rungs = [Rung(int(n), {}, int(n), int(n), int(n), 6, 128, 2**16 // 128, 1e-3, 0.95, 10, 100, 1000)
             for n in (2e7, 6e7, 2e8)]  # fmt: skip
    steps = [[int(20 * one.params / one.batch_tokens)] for one in rungs]
    found = propose(rungs, steps, tmp_path / "rates", SweepDirectory(tmp_path / "sweep"))
    assert found is not None
    for row in found["sizes"]:
        d = 20.0 * row["params"]
        assert row["best_batch"]["value"] == pytest.approx(best_batch(d), rel=0.15)
        assert row["best_lr"]["value"] == pytest.approx(best_rate(row["params"], d, best_batch(d)), rel=0.15)
    assert any("ladder.lr: {value:" in line for line in proposal_lines(found))
    assert propose(rungs, steps, None, SweepDirectory(tmp_path / "sweep")) is None
    with pytest.raises(UserError, match="no rate laws"):
        read_rates(tmp_path / "runs.csv")


def test_a_sweep_gives_its_tuning_runs(tmp_path: Path) -> None:
    rows = [{**row, "val_loss": None if row["loss"] == "nan" else row["loss"]} for row in swept((2**16,))]
    (tmp_path / "runs.jsonl").write_text("")
    with pytest.raises(UserError, match="tuned no learning rate"):
        read_source(str(tmp_path), rows="tuning")
    lines = [json.dumps({"params": row["N"], "tokens": row["D"], "lr": row["lr"], "val_loss": row["val_loss"],
                         "batch_tokens": row["batch"]}) for row in rows]  # fmt: skip
    (tmp_path / "tuning.jsonl").write_text("\n".join(lines) + "\n")
    found = rate_laws(read_source(str(tmp_path), rows="tuning"), "refuse")
    low, high = found["lr"]["law"]["exponents"]["params"]["interval"]
    assert low <= -0.33 <= high
