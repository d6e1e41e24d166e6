from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.commit import FencedError
from bigtrain.checkpoint.manifest import FileRecord, Manifest
from bigtrain.checkpoint.restore import newest_of
from bigtrain.config import CorruptionError, UserError
from bigtrain.run import RunDirectory
from bigtrain.storage import hash_file


def write(directory: Path, step: int, lease: int = 0, content: bytes = b"tensor" * 100) -> tuple[Path, Manifest]:
    """A directory as the ranks leave it, before it is published."""
    temporary = directory / commit.temporary_name(step)
    temporary.mkdir(parents=True)
    shard = temporary / "__0_0.distcp"
    shard.write_bytes(content)
    record = FileRecord(bytes=len(content), hash=hash_file(shard))
    return temporary, Manifest(step=step, files={shard.name: record}, config_hash="", identity="", lease=lease)


def save(directory: Path, *steps: int, lease: int = 0, content: bytes = b"tensor" * 100) -> None:
    for step in steps:
        commit.publish(*write(directory, step, lease, content))


def steps(directory: Path) -> list[int]:
    return [found.step for found in commit.list_checkpoints(directory)]


def damage_missing(shard: Path) -> None:
    shard.unlink()


def damage_empty(shard: Path) -> None:
    shard.write_bytes(b"")


def damage_truncated(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 1)


def damage_flipped(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)


def damage_link(shard: Path) -> None:
    shard.rename(shard.parent.parent / "outside")
    shard.symlink_to(shard.parent.parent / "outside")


def damage_manifest_missing(shard: Path) -> None:
    (shard.parent / "manifest.json").unlink()


def damage_wrong_step(shard: Path) -> None:
    other = shard.parent.parent / "step_00000001" / "manifest.json"
    shutil.copy(other, shard.parent / "manifest.json")


DAMAGES = [
    damage_missing,
    damage_empty,
    damage_truncated,
    damage_flipped,
    damage_link,
    damage_manifest_missing,
    damage_wrong_step,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 1, 2, 3)
    assert commit.newest_verified(tmp_path) == (3, [])
    damage(tmp_path / "step_00000003" / "__0_0.distcp")
    step, warnings = commit.newest_verified(tmp_path)
    assert step == 2
    assert len(warnings) == 1
    assert "step 3" in warnings[0]


def test_what_reads_a_run_reports_the_newer_checkpoint_that_it_does_not_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path / "a-run")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        newest_of(run)
    save(run.checkpoints, 1, 2)
    assert newest_of(run) == 2
    assert caplog.messages == []
    damage_flipped(run.checkpoints / "step_00000002" / "__0_0.distcp")
    assert newest_of(run) == 1
    (message,) = caplog.messages
    assert message.startswith("checkpoint of step 2 is damaged and is skipped")
    assert message.endswith("the checkpoint of step 1 is used")


def test_nothing_saved_is_no_error_and_nothing_sound_is_never_step_0(tmp_path: Path) -> None:
    assert commit.newest_verified(tmp_path / "absent") == (None, [])
    write(tmp_path, 5)
    assert commit.newest_verified(tmp_path) == (None, [])
    save(tmp_path, 1, 2)
    for step in (1, 2):
        damage_flipped(tmp_path / commit.step_name(step) / "__0_0.distcp")
    with pytest.raises(CorruptionError, match=r"step 2.*step 1"):
        commit.newest_verified(tmp_path)
    for step in (1, 2):
        shutil.rmtree(tmp_path / commit.step_name(step))
    with pytest.raises(CorruptionError, match="LATEST"):
        commit.newest_verified(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": null}', "step_00000002"])
def test_a_pointer_that_says_nothing_is_reported_where_a_run_goes_on(tmp_path: Path, content: str) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "LATEST").write_text(content)
    step, (warning,) = commit.newest_verified(tmp_path)
    assert step == 2
    assert "LATEST" in warning
    assert warning.endswith("a newer checkpoint may be missing")
    commit.withdraw(tmp_path / "step_00000002")
    assert json.loads((tmp_path / "LATEST").read_text())["step"] == 1


def test_latest_names_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    assert json.loads((tmp_path / "LATEST").read_text())["directory"] == "step_00000002"


def test_pruning_keeps_the_newest_sound_ones_and_counts_no_damaged_one(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5)
    damage_flipped(tmp_path / "step_00000004" / "__0_0.distcp")
    assert commit.prune(tmp_path, 2, set()) == [2, 1]
    assert steps(tmp_path) == [3, 4, 5]
    damage_flipped(tmp_path / "step_00000005" / "__0_0.distcp")
    assert commit.prune(tmp_path, 2, set()) == []
    assert commit.newest_verified(tmp_path)[0] == 3


def test_pruning_leaves_permanent_checkpoints_alone_and_can_be_tried_first(tmp_path: Path) -> None:
    save(tmp_path, 1, 3, 4, 5)
    temporary, manifest = write(tmp_path, 2)
    commit.publish(temporary, manifest.model_copy(update={"permanent": True}))
    assert commit.prune(tmp_path, 2, set(), dry_run=True) == [3, 1]
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert commit.prune(tmp_path, 2, set()) == [3, 1]
    assert steps(tmp_path) == [2, 4, 5]


def test_a_run_goes_back_to_an_older_checkpoint_for_good(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, lease=7)
    assert commit.rewind(tmp_path, 2) == [3, 4]
    assert steps(tmp_path) == [1, 2]
    latest = json.loads((tmp_path / "LATEST").read_text())
    assert (latest["step"], latest["lease"]) == (2, 7)
    assert commit.newest_verified(tmp_path) == (2, [])


def test_pruning_sees_that_a_checkpoint_known_good_has_lost_a_file(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    known_good: set[tuple[str, int]] = set()
    commit.prune(tmp_path, 3, known_good)
    assert len(known_good) == 3
    damage_missing(tmp_path / "step_00000003" / "__0_0.distcp")
    assert commit.prune(tmp_path, 2, known_good) == []


@pytest.mark.parametrize("asked", [1, 2])
def test_a_writer_without_the_lease_publishes_nothing(tmp_path: Path, asked: int) -> None:
    save(tmp_path, 1)
    answers = iter([True] * (asked - 1) + [False])
    temporary, manifest = write(tmp_path, 2)
    with pytest.raises(FencedError):
        commit.publish(temporary, manifest, may_publish=lambda: next(answers))
    assert json.loads((tmp_path / "LATEST").read_text())["step"] == 1
    assert (commit.find_checkpoint(tmp_path, 2) is None) == (asked == 1)


def test_an_older_lease_replaces_nothing_of_a_newer_one(tmp_path: Path) -> None:
    save(tmp_path, 3, lease=2, content=b"new")
    (tmp_path / "LATEST").unlink()
    with pytest.raises(FencedError, match="lease 2"):
        commit.publish(*write(tmp_path, 3, lease=1, content=b"old"))
    save(tmp_path, 4, lease=2)
    with pytest.raises(FencedError, match="lease 2"):
        commit.publish(*write(tmp_path, 5, lease=1))
    assert (tmp_path / "step_00000003" / "__0_0.distcp").read_bytes() == b"new"


def test_the_same_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 1, content=b"first")
    save(tmp_path, 1, content=b"second", lease=1)
    assert (tmp_path / "step_00000001" / "__0_0.distcp").read_bytes() == b"second"
    commit.prune(tmp_path, 2, set())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["LATEST", "step_00000001"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000002.old-0123abcd")
    write(tmp_path, 2)
    assert commit.newest_verified(tmp_path) == (2, [])
    assert len(commit.clean(tmp_path)) == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["LATEST", "step_00000001", "step_00000002"]


def test_a_checkpoint_that_does_not_read_back_is_withdrawn(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, content=b"first")
    save(tmp_path, 2, content=b"second")
    commit.withdraw(tmp_path / "step_00000002")
    assert (tmp_path / "step_00000002" / "__0_0.distcp").read_bytes() == b"first"
    commit.withdraw(tmp_path / "step_00000002")
    assert steps(tmp_path) == [1]
    assert json.loads((tmp_path / "LATEST").read_text())["step"] == 1


def test_cleaning_removes_leftovers_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover, _ = write(tmp_path, 2)
    (tmp_path / ".LATEST.tmp-01234567").write_text("{")
    (tmp_path / "step_notes.tmp").write_text("mine")
    assert sorted(commit.clean(tmp_path)) == sorted([leftover.name, ".LATEST.tmp-01234567"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["LATEST", "step_00000001", "step_notes.tmp"]
