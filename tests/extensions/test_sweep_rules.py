"""Every rule that a sweep may choose, and a user's own in one file, through the trials' configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import UserError
from bigtrain.config.plugin import load_plugin
from bigtrain.run import RunConfig
from bigtrain.sweeps.config import RULES, SizeFacts
from bigtrain.sweeps.journal import SweepDirectory
from bigtrain.sweeps.ladder import Rung, rung
from bigtrain.sweeps.load import load_sweep, sweep_schema
from bigtrain.sweeps.record import check_same, identity_of, sizes_of, write_record
from bigtrain.sweeps.trials import grid_trials, trial_config
from tests.sweeps.conftest import tiny_sweep

PLUGIN = Path(__file__).parent / "plugins" / "root_batch.py"
FACTS = SizeFacts(4_000_000, {"layers": 4, "width": 128}, 65_536)


@pytest.fixture
def write(tmp_path: Path, text_shards: Path) -> Callable[..., Path]:
    def _write(**ladder: Any) -> Path:
        sweep = tiny_sweep(text_shards)
        path = tmp_path / "sweep.yaml"
        path.write_text(json.dumps({**sweep, "ladder": {**sweep["ladder"], **ladder}}))
        return path

    return _write


def trial_of(path: Path) -> tuple[Rung, RunConfig]:
    sweep = load_sweep(path)
    one = rung(sweep, sizes_of(sweep)[0])
    return one, trial_config(sweep, one, grid_trials(sweep, one, one.lr, [1], [99])[0])


@pytest.mark.parametrize(
    ("rule", "gives"),
    [
        ({"value": 0.01, "at": "1M", "exponent": -0.5}, 0.005),
        ({"value": 0.01, "at": "1M", "exponent": -0.5, "least": 0.007}, 0.007),
        ({"name": "constant", "value": 0.3}, 0.3),
        ({"name": "width", "value": 0.01, "at": 64}, 0.005),
        ({"name": "by_batch"}, 0.99),
        ({"name": "by_batch", "from_tokens": 65_536}, 0.95),
    ],
)
def test_a_rule_follows_the_size(rule: dict[str, Any], gives: float) -> None:
    assert RULES.read(rule).of(FACTS) == pytest.approx(gives)


def test_a_user_s_rule_sets_the_trials(write: Callable[..., Path]) -> None:
    path = write(
        lr={"name": "root-batch", "value": 0.004, "at": 1024},
        keys={"model.init_std": {"name": "width", "value": 0.02, "at": 8, "exponent": -0.5}},
    )
    RULES.found.pop("root-batch", None)
    with pytest.raises(UserError, match="root") as unknown:
        load_sweep(path)
    assert "power" in str(unknown.value) + str(unknown.value.fix)
    load_plugin(str(PLUGIN))
    one, config = trial_of(path)
    assert one.lr == pytest.approx(0.004 * (one.batch_tokens / 1024) ** 0.5, rel=5e-3)
    assert config.optimizer.lr == one.lr
    assert config.model.plain()["init_std"] == pytest.approx(0.02 * (one.model["width"] / 8) ** -0.5, rel=5e-3)
    assert config.schedule.plain()["warmup"] == f"{one.warmup_steps} steps"
    assert "root-batch" in json.dumps(sweep_schema({"$defs": {}, "properties": {}}))


@pytest.mark.parametrize(
    ("ladder", "says"),
    [
        ({"keys": {"optimizer.lr": {"value": 1}}}, "'optimizer.lr' is set by the sweep"),
        ({"keys": {"batch.size": {"value": 1}}}, "'batch.size' is set by the sweep"),
        ({"keys": {"model.unknown_key": {"value": 1}}}, "unknown_key"),
        ({"lr": {"name": "by-batch"}}, "by_batch"),
        ({"lr": {"value": 1e308, "exponent": -50}}, "rule 'power' of ladder.lr has no valid value"),
    ],
)
def test_what_a_rule_may_not_set_is_refused(write: Callable[..., Path], ladder: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        trial_of(write(**ladder))
    assert says in f"{refused.value} {refused.value.where} {refused.value.fix}"


def test_a_record_from_before_rules_had_names_is_the_same_sweep(write: Callable[..., Path], tmp_path: Path) -> None:
    sweep, directory = load_sweep(write()), SweepDirectory(tmp_path / "runs" / "tiny")
    write_record(sweep, directory)
    record = json.loads(directory.record.read_text())
    assert record["what"] == json.loads(json.dumps(identity_of(sweep)))
    for key in ("lr", "batch", "beta2", "warmup"):
        record["what"]["ladder"][key].pop("name")
    record["what"]["ladder"].pop("keys")
    directory.record.write_text(json.dumps(record))
    check_same(sweep, directory)
    with pytest.raises(UserError, match=r"ladder\.lr\.name"):
        check_same(load_sweep(write(lr={"name": "constant", "value": 0.003})), directory)


def test_a_ladder_keeps_one_learning_rate_that_mup_carries(write: Callable[..., Path]) -> None:
    path = write(lr={"name": "mup", "value": 0.004})
    with pytest.raises(UserError, match=r"set base.model.mup: \{base_width: WIDTH\}"):
        trial_of(path)
    document = json.loads(path.read_text())
    document["base"]["model"]["mup"] = {"base_width": 8}
    path.write_text(json.dumps(document))
    sweep = load_sweep(path)
    for size in sizes_of(sweep):
        one = rung(sweep, size)
        config = trial_config(sweep, one, grid_trials(sweep, one, one.lr, [1], [99])[0])
        assert (config.optimizer.lr, config.model.plain()["mup"]["base_width"]) == (0.004, 8)
        assert one.hidden_lr == pytest.approx(0.004 * 8 / one.model["width"], rel=5e-3)
