"""The best checkpoints by a held-out metric: what pruning keeps, and what RUN@best names."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.best import best_checkpoints, record_of
from bigtrain.checkpoint.config import BestConfig
from bigtrain.checkpoint.manifest import FileRecord, Manifest
from bigtrain.checkpoint.restore import resolve_best
from bigtrain.config import UserError
from bigtrain.storage import hash_file

MIN, MAX = BestConfig(), BestConfig(mode="max", keep=2)


def save(directory: Path, step: int, value: float | None, rule: BestConfig | None = MIN) -> Path:
    """Commit a checkpoint of one small file, whose evaluation gave `value`."""
    temporary = directory / commit.temporary_name(step)
    temporary.mkdir(parents=True)
    shard = temporary / "__0_0.distcp"
    shard.write_bytes(b"tensor")
    files = {shard.name: FileRecord(bytes=6, hash=hash_file(shard))}
    callbacks = {} if rule is None else {"best": record_of(rule, value)}
    manifest = Manifest(step=step, files=files, config_hash="", identity="", progress={"callbacks": callbacks})
    return commit.publish(temporary, manifest)


def best(directory: Path) -> list[int]:
    return [one.step for one in best_checkpoints(directory)]


def test_the_best_are_those_of_the_newest_rule_and_equal_values_favour_the_earlier(tmp_path: Path) -> None:
    for step, value in ((1, 3.0), (2, 2.0), (3, None), (4, 2.0), (5, 2.5)):
        save(tmp_path, step, value)
    assert best(tmp_path) == [2]
    save(tmp_path, 6, None, MAX)
    assert best(tmp_path) == [1, 5]
    save(tmp_path, 7, 0.5, BestConfig(metric="val_accuracy", mode="max"))
    assert best(tmp_path) == [7]
    save(tmp_path, 8, None, None)
    assert best(tmp_path) == []


def test_a_damaged_checkpoint_is_not_the_best(tmp_path: Path) -> None:
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0)):
        save(tmp_path, step, value)
    shard = tmp_path / commit.step_name(1) / "__0_0.distcp"
    shard.write_bytes(b"tensos")
    assert [one.step for one in best_checkpoints(tmp_path, set())] == [2]
    shard.write_bytes(b"")
    assert best(tmp_path) == [2]


def test_run_at_best_names_its_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run / "checkpoints", 5, 1.5)
    save(run / "checkpoints", 9, 1.7)
    assert resolve_best(f"{run}@best", tmp_path) == f"{run}@5"
    assert resolve_best("run@9", tmp_path) == "run@9"
    save(run / "checkpoints", 10, None, None)
    with pytest.raises(UserError, match="keeps no best"):
        resolve_best(f"{run}@best", tmp_path)
