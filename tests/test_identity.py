"""Runs are what they are called: copied, renamed, mixed up and recorded by earlier versions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bigtrain.checkpoint import commit
from bigtrain.config import UserError
from bigtrain.jobs.check import check
from bigtrain.run import Lease, RunDirectory, find_run, load_config, with_defaults
from bigtrain.storage import read_lines
from bigtrain.training.prepare import prepare

RECORDED_LATER = (
    ("optimizer", "frozen"), ("optimizer", "groups"), ("model", "tied"), ("model", "dropout"), ("schedule", "name"),
    ("data", "document_mask"), ("data", "shuffle_window"), ("init", "fresh"), ("precision",),
)  # fmt: skip
"""Keys with a default; a run of a version that did not have one of them lacks it in its record."""


def started(config: Path, runs: Path, **changes: object) -> RunDirectory:
    """A run that was started and has no checkpoint yet."""
    loaded = load_config(config).model_copy(update=changes)
    prepared = prepare(loaded, verify=False)
    directory = RunDirectory(runs / loaded.name)
    directory.write(loaded, prepared.what)
    return directory


@pytest.mark.parametrize("keys", RECORDED_LATER, ids=".".join)
def test_a_key_that_an_old_record_lacks_equals_its_default_and_no_other_value(
    keys: tuple[str, ...], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(precision="bf16")
    config.write_text(config.read_text().replace("tied: true", "tied: false"))
    directory = started(config, tmp_path / "runs")
    record = directory.read_record()
    section = record["what"]
    for key in keys[:-1]:
        section = section[key]
    removed = section.pop(keys[-1])
    directory.record.write_text(json.dumps(record))
    same = load_config(config)
    assert check(same, tmp_path / "runs").directory.name == "tiny"
    now = prepare(same, verify=False).what
    completed = with_defaults(directory.recipe(), now, same)
    assert completed == now
    # The same record beside a config that sets the key is another run.
    section[keys[-1]] = removed if not isinstance(removed, bool) else not removed
    if isinstance(removed, bool):
        directory.record.write_text(json.dumps(record))
        with pytest.raises(UserError, match="trains something else"):
            check(same, tmp_path / "runs")


def test_a_key_of_a_nested_section_that_an_old_record_lacks_equals_its_default(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    groups = [{"pattern": "*norm*", "lr_scale": 0.5}, {"pattern": "embedding*", "weight_decay": 0.0}]
    config = write_config(optimizer={"lr": 1e-3, "groups": groups})
    directory = started(config, tmp_path / "runs")
    record = directory.read_record()
    assert record["what"]["optimizer"]["groups"][1].pop("lr_scale") == 1.0
    directory.record.write_text(json.dumps(record))
    assert check(load_config(config), tmp_path / "runs")
    record["what"]["optimizer"]["groups"][0].pop("lr_scale")
    directory.record.write_text(json.dumps(record))
    with pytest.raises(UserError, match="lr_scale"):
        check(load_config(config), tmp_path / "runs")


def test_the_config_of_a_copied_directory_is_that_of_the_copy(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = started(write_config(), tmp_path / "runs")
    copy = tmp_path / "runs" / "copy"
    shutil.copytree(original.path, copy)
    assert load_config(copy / "config.yaml").name == "copy"
    assert load_config(original.config).name == "tiny"
    assert check(load_config(copy / "config.yaml"), copy.parent).directory.path == copy
    assert load_config(copy / "config.yaml", ["name=other"]).name == "other"
    monkeypatch.chdir(copy)
    assert find_run(".", Path("runs")).name == "copy"
    assert load_config(Path("config.yaml")).name == "copy"


def test_a_copy_of_a_run_under_way_is_nobodys_and_a_renamed_one_is_still_held(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    original = started(write_config(), tmp_path / "runs")
    held = Lease.acquire(original)
    copy = RunDirectory(tmp_path / "runs" / "copy")
    shutil.copytree(original.path, copy.path)
    taken = Lease.acquire(copy)
    assert taken.number == held.number + 1
    assert taken.held()
    assert held.held()
    renamed = RunDirectory(original.path.rename(tmp_path / "runs" / "renamed"))
    with pytest.raises(UserError, match="in use"):
        Lease.acquire(renamed)


@pytest.mark.slow
def test_a_copy_is_trained_on_and_the_original_is_not_touched(
    write_config: Callable[..., Path], tmp_path: Path, bigtrain: Callable
) -> None:
    runs = tmp_path / "runs"
    assert bigtrain("train", write_config()).returncode == 0
    shutil.copytree(runs / "tiny", runs / "copy")
    before = {path: path.read_bytes() for path in (runs / "tiny").rglob("*") if path.is_file()}
    done = bigtrain("resume", "copy", "--step", "4")
    assert done.returncode == 0, done.stderr
    assert "copy: 0.06M parameters" in done.stderr
    assert "is a copy of the run 'tiny'" in done.stderr
    assert before == {path: path.read_bytes() for path in (runs / "tiny").rglob("*") if path.is_file()}
    assert [one.step for one in commit.list_checkpoints(runs / "copy" / "checkpoints")] == [4, 8]
    events = [event["event"] for event in read_lines(runs / "copy" / "events.jsonl")]
    assert "fallback" not in events
    _a_checkpoint_of_another_run_is_refused(write_config, runs, bigtrain)
    _a_newest_checkpoint_that_is_gone_is_reported(write_config, runs, bigtrain)


def _a_checkpoint_of_another_run_is_refused(write_config: Callable[..., Path], runs: Path, bigtrain: Callable) -> None:
    other = write_config(seed=2, name="other")
    started(other, runs)
    shutil.copytree(runs / "tiny" / "checkpoints", runs / "other" / "checkpoints")
    refused = bigtrain("train", other)
    assert refused.returncode == 2
    assert "was saved by a run that trains something else" in refused.stderr
    verified = bigtrain("checkpoint", "verify", "other")
    assert verified.returncode == 2
    assert "step 4 was saved by a run that trains something else" in verified.stderr


def _a_newest_checkpoint_that_is_gone_is_reported(
    write_config: Callable[..., Path], runs: Path, bigtrain: Callable
) -> None:
    shutil.move(runs / "tiny" / "checkpoints" / "step_00000008", runs / "moved")
    (runs / "tiny" / "checkpoints" / "step_00000008").symlink_to(runs / "moved")
    done = bigtrain("train", write_config(duration="6 steps"))
    assert done.returncode == 0, done.stderr
    assert "warning: LATEST refers to step 8, but step_00000008 is a symbolic link" in done.stderr
    assert "the run continues from step 4" in done.stderr
    (found,) = [event for event in read_lines(runs / "tiny" / "events.jsonl") if event["event"] == "fallback"]
    assert "LATEST refers to step 8" in found["cause"]
