"""Ladders, trials and plans: what follows from a sweep's file, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml

from bigtrain.config import UserError, yaml_file
from bigtrain.run import config_schema
from bigtrain.scaling.bootstrap import MIN_CLUSTERS
from bigtrain.sweeps import design
from bigtrain.sweeps.config import ExpectedConfig
from bigtrain.sweeps.cost import makespan
from bigtrain.sweeps.ladder import rung
from bigtrain.sweeps.load import load_sweep, sweep_schema
from bigtrain.sweeps.plan import make_plan, plan_text
from bigtrain.sweeps.record import sizes_of
from bigtrain.sweeps.results import saved_flops
from bigtrain.sweeps.trials import Trial, decay_start, grid_trials, lengths, trial_config

WriteSweep = Callable[..., Path]
SWEEPS = Path(__file__).resolve().parents[2] / "configs" / "sweeps"
EXPECTED = ExpectedConfig()


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(design, "DRAWS", 8)


def planned(path: Path, tmp_path: Path) -> dict[str, Any]:
    return make_plan(load_sweep(path), tmp_path / "runs", measure=False, say=lambda line: None)


def test_a_rung_follows_from_its_size_by_the_rules(write_sweep: WriteSweep) -> None:
    """The defaults are OLMo's ladder: 2048 * 160 tokens and 0.0047 / 2 at 108M parameters."""
    sizes = [{"params": 108_000_000, "model": {"layers": 12, "width": 864, "heads": 8, "mlp_width": 2304}}]
    sweep = load_sweep(write_sweep(sizes=sizes, ladder={}))
    one = rung(sweep, sizes_of(sweep)[0])
    model = trial_config(sweep, one, grid_trials(sweep, one, one.lr, [1], [99])[0]).model
    share = one.params / 108e6
    assert one.params == model.parameter_count_without_embeddings(one.vocab_size)
    assert one.params_total == model.parameter_count(one.vocab_size)
    assert one.flops_per_token == model.flops_per_token(one.vocab_size).full
    assert one.batch_tokens == pytest.approx(327680 * share ** (2 / 3), abs=16)
    assert one.lr == pytest.approx(0.00235 * share ** (-1 / 3), rel=2e-3)
    assert one.beta2 == 0.99
    assert one.warmup_steps * one.batch_tokens == pytest.approx(one.params, rel=1e-2)


def test_shapes_come_near_their_targets(write_sweep: WriteSweep) -> None:
    sizes = [16_000, 100_000, 1_000_000, 30_000_000]
    sweep = load_sweep(write_sweep(sizes=sizes, ladder={"width_multiple": 8, "head_width": 16, "aspect": 20}))
    for size in sizes_of(sweep):
        one = rung(sweep, size)
        assert abs(one.params / one.target - 1) < 0.15
        assert 20 / 3 < one.model["width"] / one.model["layers"] < 20 * 3


def test_trunk_and_branches_share_their_steps(write_sweep: WriteSweep) -> None:
    sweep = load_sweep(write_sweep(sizes=[3000], tokens_per_param=[4, 8, 16]))
    size = sizes_of(sweep)[0]
    one = rung(sweep, size)
    steps = lengths(sweep, size, one)
    trials = grid_trials(sweep, one, one.lr, [5], steps)
    trunk, branches = trials[0], trials[1:]
    assert trunk.kind == "trunk"
    assert trunk.save_at == tuple(decay_start(sweep, length) for length in steps)
    assert [(one.steps, one.parent_step) for one in branches] == list(zip(steps, trunk.save_at, strict=True))
    schedule = trial_config(sweep, one, branches[-1]).schedule.build(1.0, steps[-1], lambda d: int(d.value))
    stable = trial_config(sweep, one, trunk).schedule.build(1.0, trunk.steps, lambda d: int(d.value))
    assert [schedule.lr(s) for s in range(trunk.steps)] == [stable.lr(s) for s in range(trunk.steps)]
    own, separate = saved_flops(trials)
    assert own == pytest.approx(one.flops(trunk.steps + sum(length - decay_start(sweep, length) for length in steps)))
    assert separate == pytest.approx(one.flops(sum(steps)))
    assert grid_trials(sweep, one, one.lr, [5], steps, trials) == []
    assert [Trial.parse(json.loads(json.dumps(trial.plain()))) for trial in trials] == trials


def test_branches_wait_for_their_step_of_the_trunk_alone() -> None:
    trunk = Trial("t", "trunk", 1, 1, 0.1, "g", 80, save_at=(20, 80), tokens=80, flops=80.0)
    early = Trial("a", "branch", 1, 1, 0.1, "g", 30, parent="t", parent_step=20, tokens=30, flops=30.0)
    late = Trial("b", "branch", 1, 1, 0.1, "g", 90, parent="t", parent_step=80, tokens=90, flops=90.0)
    assert makespan([trunk, early, late], [80.0, 10.0, 10.0], 2) == pytest.approx(90.0)
    assert makespan([trunk, early, late], [80.0, 10.0, 10.0], 1) == pytest.approx(100.0)


def test_the_linear_estimate_ranks_grids_as_simulation_does() -> None:
    target = 1e21
    narrow = design.regular_grid([10**7, 3 * 10**7, 10**8], (10.0, 20.0, 40.0), 1)
    wide = design.regular_grid([10**7, 2 * 10**7, 5 * 10**7, 10**8, 2 * 10**8], (5.0, 10.0, 20.0, 40.0, 80.0), 3)
    linear = [design.linear_width(grid, EXPECTED, target) for grid in (narrow, wide)]
    simulated = [design.simulate(grid, EXPECTED, target, draws=25).width for grid in (narrow, wide)]
    assert linear[1] < linear[0]
    assert simulated[1] < simulated[0]
    assert simulated[1] == pytest.approx(linear[1], rel=0.8)
    assert design.linear_width(design.regular_grid([10**7, 10**8, 10**9], (20.0,), 1), EXPECTED, 1e23) == np.inf


def test_a_plan_shows_the_learning_rates_that_mup_gives(write_sweep: WriteSweep, tmp_path: Path) -> None:
    path = write_sweep(sizes=[1300, 3000, 6000, 12000], tokens_per_param=[2, 4, 8, 16])
    document = yaml.safe_load(path.read_text())
    document["base"]["model"]["mup"] = {"base_width": 8}
    document["ladder"]["lr"] = {"name": "mup", "value": 0.004}
    path.write_text(yaml.safe_dump(document))
    plan = planned(path, tmp_path)
    for size in plan["sizes"]:
        assert size["hidden_lr"] == pytest.approx(0.004 * 8 / size["model"]["width"], rel=5e-3)
        assert f"0.004, hidden {size['hidden_lr']:g}" in plan_text(plan)
        assert f"0.004, hidden {size['hidden_lr']:g}" in Path(plan["files"][1]).read_text()


def test_a_plan_states_grid_cost_and_interval(write_sweep: WriteSweep, tmp_path: Path) -> None:
    path = write_sweep(
        sizes=[1300, 3000, 8000], tokens_per_param=[4, 8, 16],
        hardware={"device": "H100 SXM", "mfu": 0.4, "start_s": 10}, base={**yaml.safe_load(
            write_sweep().read_text())["base"], "precision": "bf16"},
    )  # fmt: skip
    plan = planned(path, tmp_path)
    assert len(plan["points"]) == 9
    assert [trial["kind"] for trial in plan["trials"]].count("trunk") == 3
    assert plan["cost"]["flops"] == pytest.approx(sum(
        trial["flops"] * (trial["steps"] - trial["parent_step"]) / trial["steps"] for trial in plan["trials"]
    ))  # fmt: skip
    assert 0 < plan["cost"]["saved"] < 1
    assert plan["cost"]["seconds"] > 10 * 12 / 2
    assert plan["cost"]["usd"] == pytest.approx(plan["cost"]["slot_seconds"] / 3600 * 2.99)
    assert plan["target_flops"] == 10 * plan["largest_run_flops"]
    assert plan["expected"]["width"] > 0
    assert any(f"fewer than {MIN_CLUSTERS}" in text for text in plan["warnings"])
    assert json.loads((tmp_path / "runs" / "tiny" / "plan.json").read_text()) == plan
    page = (tmp_path / "runs" / "tiny" / "plan.html").read_text()
    assert page.count('type="application/json"') == 2
    for text in ("41%", "9 runs of 3 sizes", "H100 SXM"):
        assert text in plan_text(plan).replace(f"{plan['cost']['saved']:.0%}", "41%")


def test_named_hardware_is_timed_by_the_planner(write_sweep: WriteSweep, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: h100\nusd_per_hour: 7.0\nrates: {launch_s: 1.0e-3}\n")
    costs = []
    for name, device in (("h100", "h100"), ("mine", str(mine))):
        path = write_sweep(
            sizes=[1300, 3000, 8000], hardware={"device": device, "start_s": 0}, base={
                **yaml.safe_load(write_sweep().read_text())["base"], "precision": "bf16"
            },
        )  # fmt: skip
        costs.append(planned(path, tmp_path / name)["cost"])
    fast, slow = costs
    assert fast["time_by"] == "the planner, on h100"
    assert slow["seconds"] > fast["seconds"] > 0
    assert slow["usd"] == pytest.approx(slow["slot_seconds"] / 3600 * 7.0)


def test_a_budget_chooses_the_grid_with_the_narrowest_interval(
    write_sweep: WriteSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(design, "FINALISTS", 2)
    plan = planned(write_sweep(sizes="auto", budget={"flops": 1e18}, target={"flops": 1e20}), tmp_path)
    assert all(0.9e18 < grid["flops"] < 1.1e18 for grid in plan["grids"])
    widths = [grid["width"] for grid in plan["grids"]]
    assert widths == sorted(widths)
    assert f"sizes: {plan['grids'][0]['sizes']}" in plan_text(plan)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "one ratio": ({"sizes": [1300, 3000, 8000, 16000, 40000, 99000], "tokens_per_param": [8]}, "D follows from N"),
    "two sizes": ({"tokens_per_param": [4, 8, 16]}, "2 different sizes N"),
    "target inside": ({"sizes": [1300, 3000, 8000], "target": {"flops": 1e9}}, "lies inside the data"),
    "over budget": ({"sizes": [1300, 3000, 8000], "budget": {"flops": 1e6}}, "but the budget is 1e+06"),
    "lengths that fall together": ({"tokens_per_param": [4.0, 4.001]}, "Two lengths round to the same number of steps"),
    "a long warm-up": (
        {"tokens_per_param": [1, 2], "ladder": {"width_multiple": 8, "head_width": 8, "batch": {"value": 256}}},
        "The warm-up of",
    ),
    "unknown device": ({"sizes": [1300, 3000, 8000], "hardware": {"device": "H1000", "mfu": 0.4}}, "'H1000'"),
    "no shape": ({"sizes": [1000, 3000, 8000]}, "No shape has about 1,000"),
    "a size twice": ({"sizes": [3000, {"params": 3000}]}, "appears twice"),
    "unknown key": ({"sises": [1]}, "Did you mean 'sizes'"),
    "unknown key in a size": ({"sizes": [{"params": 3000, "seed": [1]}]}, "Did you mean 'seeds'"),
    "text for a number": ({"sizes": ["many"]}, "sizes.0"),
    "auto without a budget": ({"sizes": "auto"}, "budget"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sweeps_are_refused_by_name(write_sweep: WriteSweep, tmp_path: Path, name: str) -> None:
    keys, message = BAD[name]
    with pytest.raises(UserError, match=re.escape(message)):
        planned(write_sweep(**keys), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"duration": "10 steps"}, "'base.duration' is set by the sweep"),
        ({"optimizer": {"lr": 1.0}}, "'base.optimizer.lr' is set by the sweep"),
        ({"model": {"arch": "llama", "context": 32, "layers": 3}}, "'base.model.layers' is set by the sweep"),
        ({"evaluation": {"batches": 20}}, "'base.evaluation.batches' is set by the sweep"),
        ({"data": {"train": "shards/nowhere"}}, "'base.data.validation' is missing"),
        ({"precison": "fp32"}, "Did you mean 'precision'"),
        ({"precision": "fp99"}, "'fp99'"),
    ],
)
def test_a_wrong_base_run_is_refused_with_its_line(
    write_sweep: WriteSweep, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    base = yaml.safe_load(write_sweep().read_text())["base"]
    path = write_sweep(base={**base, **change})
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        planned(path, tmp_path)
    assert re.search(r"sweep\.yaml, line \d+", str(caught.value))


def test_the_shipped_sweeps_are_as_they_say(text_shards: Path, tmp_path: Path) -> None:
    """The laptop's: five sizes over a factor of 25, four D over 8 each, D/N from 5 to 80, three seeds."""
    data = [f"base.data.{part}={text_shards / part}" for part in ("train", "validation")]
    laptop = load_sweep(SWEEPS / "laptop.yaml", data)
    plan = make_plan(laptop, tmp_path, measure=False, say=lambda line: None)
    params = [one["params"] for one in plan["sizes"]]
    assert len(params) >= 5
    assert max(params) / min(params) >= 25
    assert plan["points"][0]["params"] == max(params)
    for one in plan["sizes"]:
        assert len(one["tokens"]) >= 4
        assert max(one["tokens"]) / min(one["tokens"]) > 7.9
    ratios = [point["tokens_per_param"] for point in plan["points"]]
    assert (min(ratios), max(ratios)) == pytest.approx((5, 80), rel=0.01)
    assert max(len(size.seeds or ()) for size in sizes_of(laptop)) >= 3
    assert (laptop.config.slots.count, laptop.config.slots.threads) == (2, 1)
    held = max(point["flops"] for point in plan["points"])
    assert len([point for point in plan["points"] if point["flops"] <= held / 3]) > 20
    schema = sweep_schema(config_schema())
    for file in SWEEPS.glob("*.yaml"):
        jsonschema.validate(yaml_file.parse(file.read_text(), file.name).value, schema)
        assert load_sweep(file).config.name


def test_the_commands_answer_in_json(bigtrain: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = bigtrain("sweep", "status", "nothing", "--json")
    assert done.returncode == 2
    assert "There is no sweep 'nothing'" in json.loads(done.stdout)["error"]
