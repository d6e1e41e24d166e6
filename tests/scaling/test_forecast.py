"""A forecast that is frozen before a run, and the run that is held against it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.config import UserError
from bigtrain.optim.schedules.wsd import WarmupStableDecay
from bigtrain.run import RunDirectory, names
from bigtrain.scaling import law
from bigtrain.scaling.curves import predict_curve
from bigtrain.scaling.fit import fit
from bigtrain.scaling.forecast import make_forecast
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.report import write_outputs
from bigtrain.storage import append_line
from bigtrain.sweeps.preregister import other_recipe, preregister
from bigtrain.tracking.forecast import (
    BINS,
    DRIFT,
    SLACK,
    Drift,
    Watch,
    correlation_matrix,
    forecast_hash,
    held_against,
    read_forecast,
    watch_rows,
)
from bigtrain.tracking.report import write_report
from tests.bench import forecast_power
from tests.bench.forecast_power import rows_of, write_sweep

TRUTH = np.array([np.log(482.0), np.log(2085.0), np.log(1.82), 0.348, 0.366])
STEPS = 200
PARAMS, TOKENS = 3e8, 6e9


def curve(params: float, tokens: float, generator: np.random.Generator, worse: float = 0.0) -> list[dict[str, Any]]:
    """Logged objects of a run whose training loss falls to the law's at its end."""
    end = float(law.loss(TRUTH, params, tokens))
    rows = []
    for step in range(1, STEPS + 1):
        share = step / STEPS
        loss = end * (1 + 0.3 * (1 - share) + 0.5 * np.exp(-12 * share)) * np.exp(0.004 * generator.normal())
        rows.append({"step": step, "tokens": tokens * share, "loss": float(loss) * (1 + worse)})
    rows[-1]["val_loss"] = end * (1 + worse) * float(np.exp(0.001 * generator.normal()))
    return rows


@pytest.fixture(scope="module")
def law_of_a_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The law of a sweep whose runs have curves."""
    sweep = tmp_path_factory.mktemp("sweep")
    generator = np.random.default_rng(0)
    for size in np.geomspace(1e7, 1e8, 5).tolist():
        for ratio in (10.0, 20.0, 40.0):
            name, tokens = f"n{size:.3g}-{ratio:g}", size * ratio
            rows = curve(size, tokens, generator)
            for row in rows:
                append_line(_made(sweep / "trials" / name) / names.METRICS, row)
            append_line(sweep / "runs.jsonl", {
                "run": name, "group": f"{size:.3g}", "phase": "decayed", "params": size, "tokens": tokens,
                "flops": 6 * size * tokens, "val_loss": rows[-1]["val_loss"],
            })  # fmt: skip
    fitted = fit(str(sweep), FitOptions(approach="a3", loss_function="huber", replicates=100, processes=1, starts=2))
    write_outputs(fitted, sweep / "law")
    return sweep / "law"


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def started(path: Path, forecast: dict[str, Any], rows: list[dict[str, Any]]) -> RunDirectory:
    """A run that was preregistered, has started, and has logged those objects."""
    directory = RunDirectory(path)
    preregister(directory, forecast)
    record = {"format_version": 1, "name": path.name, "what": {}, "forecast": forecast_hash(path)}
    directory.record.write_text(json.dumps(record))
    directory.event("started", step=0, total_steps=STEPS)
    directory.event("forecast", hash=forecast_hash(path))
    for row in rows:
        append_line(directory.metrics, row)
    return directory


def test_a_run_that_follows_the_law_stays_inside(law_of_a_sweep: Path, tmp_path: Path) -> None:
    forecast = make_forecast(law_of_a_sweep, PARAMS, TOKENS, STEPS, [])
    assert len(forecast["curve"]) == BINS
    assert forecast["loss"]["interval"][0] < law.loss(TRUTH, PARAMS, TOKENS) < forecast["loss"]["interval"][1]
    directory = started(tmp_path / "run", forecast, curve(PARAMS, TOKENS, np.random.default_rng(5)))
    held = held_against(directory.path)
    assert held is not None
    assert (held["state"], held["final"]["inside"]) == ("inside", True)
    assert len(held["points"]) == BINS
    text = write_report(directory.path).read_text()
    assert "The run is inside the band of its forecast" in text
    assert f"{held['final']['measured']:.5f}" in text


def test_sound_runs_rarely_leave(law_of_a_sweep: Path) -> None:
    """The whole band holds for 95 % of runs, and so does the interval of the held-out loss at the end."""
    forecast = make_forecast(law_of_a_sweep, PARAMS, TOKENS, STEPS, [])
    law_alone = forecast["loss"]["interval_of_law"]
    low, high = forecast["loss"]["interval"]
    assert low < law_alone[0] < law_alone[1] < high
    left = []
    for draw in range(60):
        watch = Watch(forecast)
        for row in curve(PARAMS, TOKENS, np.random.default_rng(100 + draw)):
            watch.add(row["step"], row["tokens"], row["loss"], row.get("val_loss"))
        left.append(watch.left is not None)
    assert np.mean(left) <= 0.05


@pytest.mark.parametrize(("factor", "step"), [(1.0, None), (2.0, 11), (0.5, STEPS // 2)])
def test_another_learning_rate_than_the_forecasts_is_seen(factor: float, step: int | None) -> None:
    watch = Watch({"steps": STEPS, "tokens": 100.0 * STEPS, "curve": [], "loss": {}, "highest_lr": 1e-3})
    for number in range(1, STEPS + 1):
        lr = factor * 1e-3 * min(number / 20, 1.0, (STEPS - number) / 50)
        watch.add(number, 100.0 * number, 3.0, None, lr)
    assert (watch.left or {}).get("step") == step
    assert (watch.left or {"what": "lr"})["what"] == "lr"


def test_a_drift_inside_the_band_is_seen(law_of_a_sweep: Path) -> None:
    """A loss that rises by 1.2 % and falls again is what a learning rate that is too high does before its decay."""
    forecast = make_forecast(law_of_a_sweep, PARAMS, TOKENS, STEPS, [])
    for draw in range(5):
        rows = curve(PARAMS, TOKENS, np.random.default_rng(200 + draw))
        for row in rows:
            row["loss"] *= 1 + 0.012 * np.sin(np.pi * row["step"] / STEPS)
        watch = Watch(forecast)
        for row in rows:
            watch.add(row["step"], row["tokens"], row["loss"], row.get("val_loss"))
        assert watch.left is not None
        assert (watch.left["what"], watch.left["low"]) == ("drift", -DRIFT)
        assert watch.left["measured"] > DRIFT
        assert watch.left["step"] < STEPS / 2


@pytest.mark.parametrize("known", [range(40), [0, 1, 2, 5, 6, 30, 39]])
def test_errors_of_sound_runs_have_independent_innovations(known: list[int]) -> None:
    """The sums are those of independent standard normal values, whatever the correlation; 2 % of 40 reach the limit."""
    generator = np.random.default_rng(0)
    correlation, level, deviations = (0.3, 0.5, 0.9), 0.02, np.linspace(0.02, 0.01, BINS)
    covariance = deviations[:, None] * deviations * correlation_matrix(correlation, range(BINS)) + level**2
    errors = generator.multivariate_normal(np.zeros(BINS), covariance, size=150)
    largest, plain = [], []
    for one in errors:
        drift = Drift(correlation, level)
        largest.append(max(abs(drift.add(k, k, one[k], deviations[k])) for k in known))
        up = down = top = 0.0
        for z in generator.normal(size=len(known)):
            up, down = max(0.0, up + z - SLACK), max(0.0, down - z - SLACK)
            top = max(top, up, down)
        plain.append(top)
    assert np.median(largest) == pytest.approx(np.median(plain), rel=0.15)
    assert np.mean(np.array(largest) > DRIFT) <= 0.05


@dataclass
class Stub:
    """What `other_recipe` reads of a prepared run; the real one needs shards and a model."""

    schedule: WarmupStableDecay
    batch_sequences: int
    context: int
    total_steps: int


@pytest.mark.parametrize(
    ("change", "named"),
    [({}, []), ({"lr": 2.0}, ["learning rate"]), ({"batch": 2}, ["batch", "warm-up"]), ({"decay": 0.5}, ["decay"])],
)
def test_a_run_by_other_rules_than_the_sweeps_is_warned_of(
    tmp_path: Path, change: dict[str, float], named: list[str]
) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "name: s\nbase: {model: {arch: llama}, data: {train: t, validation: v}}\nsizes: [10k]\n"
        "ladder:\n  batch: {value: 1000, at: 10k, exponent: 0.5}\n  lr: {value: 0.01, at: 10k, exponent: -0.5}\n"
        "  decay: 0.2\n"
    )
    (tmp_path / "law.json").write_text(
        json.dumps({"kind": "bigtrain scaling law", "format_version": 1, "source": {"name": str(tmp_path)}})
    )
    steps, params = 500, 40_000.0
    decay = round(steps * 0.2 * change.get("decay", 1.0))
    lr = 0.005 * change.get("lr", 1.0)
    schedule = WarmupStableDecay(lr, 20, steps, decay, 0.0, "linear")
    found = other_recipe(tmp_path, Stub(schedule, 20 * int(change.get("batch", 1)), 100, steps), params, {})  # type: ignore[arg-type]
    assert len(found) == len(named)
    for name, text in zip(named, found, strict=True):
        assert name in text


def test_a_worse_run_leaves_the_band_and_the_step_is_reported(law_of_a_sweep: Path, tmp_path: Path) -> None:
    forecast = make_forecast(law_of_a_sweep, PARAMS, TOKENS, STEPS, [])
    rows = curve(PARAMS, TOKENS, np.random.default_rng(5))
    for row in rows[STEPS // 2 :]:
        row["loss"] *= 1.1
    watch = Watch(forecast)
    said = [left for row in rows if (left := watch.add(row["step"], row["tokens"], row["loss"], row.get("val_loss")))]
    assert len(said) == 1
    assert abs(said[0]["step"] - STEPS // 2) <= 2 * STEPS // BINS
    held = held_against(started(tmp_path / "run", forecast, rows).path)
    assert held is not None
    assert (held["state"], held["left"]) == ("left", said[0])


def test_a_forecast_cannot_be_changed_after_the_start_without_being_seen(law_of_a_sweep: Path, tmp_path: Path) -> None:
    forecast = make_forecast(law_of_a_sweep, PARAMS, TOKENS, STEPS, [])
    rows = curve(PARAMS, TOKENS, np.random.default_rng(5))
    directory = started(tmp_path / "run", forecast, rows)
    path = directory.path / names.FORECAST
    path.write_text(path.read_text().replace(forecast["created"], "2020-01-01T00:00:00+00:00"))
    assert (held_against(directory.path) or {})["state"] == "changed"
    # Not even where run.json is made to agree: the event has the hash too.
    record = json.loads(directory.record.read_text())
    directory.record.write_text(json.dumps({**record, "forecast": forecast_hash(directory.path)}))
    assert (held_against(directory.path) or {})["state"] == "changed"
    path.unlink()
    assert (held_against(directory.path) or {})["state"] == "changed"
    with pytest.raises(UserError, match="has started"):
        preregister(directory, forecast)


def test_a_forecast_is_made_once_and_before_the_run(law_of_a_sweep: Path, tmp_path: Path) -> None:
    forecast = make_forecast(law_of_a_sweep, PARAMS, TOKENS, STEPS, [])
    directory = RunDirectory(tmp_path / "run")
    preregister(directory, forecast)
    assert not directory.is_foreign()
    assert read_forecast(directory.path) == json.loads(json.dumps(forecast))
    assert (held_against(directory.path) or {})["state"] == "waiting"
    with pytest.raises(UserError, match="has a forecast"):
        preregister(directory, forecast)


def test_a_sweep_of_too_few_trunks_gives_no_curve() -> None:
    rows = [
        {"run": f"r{i}", "parent": f"t{i % 2}", "params": 1e7 * (1 + i % 2), "tokens": 1e8 * (1 + i)} for i in range(6)
    ]
    none = np.full((6, BINS), np.nan)
    assert predict_curve(rows, np.zeros((6, BINS)), none, 1e7, 1e9, none[0]) is None


@pytest.mark.slow
def test_a_seed_of_the_sweep_narrows_the_errors_and_a_doubled_rate_drifts(tmp_path: Path) -> None:
    """The text of a seed is the same at all sizes, so trunks with the new run's seed show its noise."""
    found = write_sweep(tmp_path / "sweep", 0)
    paired, other = (make_forecast(found, 3e7, 9e8, forecast_power.STEPS, [], seed) for seed in (1, 3))
    deviations = [np.median([one["deviation"] for one in made["curve"]]) for made in (paired, other)]
    assert deviations[0] < 0.75 * deviations[1]
    assert f"37 of {BINS} shares by the text" in paired["curve_source"]
    sound, doubled = (
        watch_rows(paired, rows_of(0, 1, 3e7, 9e8, 0.0, 1.0, fault)).left for fault in ("sound", "doubled")
    )
    assert sound is None
    assert doubled is not None
    assert doubled["what"] == "drift"
