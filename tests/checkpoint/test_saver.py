from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigtrain.checkpoint import commit, loader
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.saver import PHASES, Saver

StateAt = Callable[[int], dict[str, Tensor]]
FACTS: dict[str, Any] = {"progress": {}, "config_hash": "c", "identity": "i"}


class Events(list[tuple[str, dict[str, Any]]]):
    """Records what a Saver reports."""

    def __call__(self, event: str, /, **fields: Any) -> None:
        self.append((event, fields))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self]


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file of this process may grow over `limit` bytes: writing fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_asynchronous_save_keeps_the_values_of_its_step(tmp_path: Path, state_at: StateAt) -> None:
    released = threading.Event()
    saver = Saver(tmp_path, CheckpointConfig(), phase_hook=lambda phase: released.wait(10) and None)
    state = state_at(1)
    saver.save(1, state, **FACTS)
    assert saver.busy
    for tensor in state.values():
        tensor.zero_()
    released.set()
    outcome = saver.wait()
    assert outcome is not None
    assert outcome.status == "saved"
    loader.load(tmp_path, 1, state)
    for name, tensor in state_at(1).items():
        assert torch.equal(state[name], tensor), name
    saver.close()


def test_a_save_waits_for_the_one_before_and_says_so(tmp_path: Path, state_at: StateAt) -> None:
    events = Events()
    saver = Saver(tmp_path, CheckpointConfig(), on_event=events, phase_hook=lambda phase: time.sleep(0.02))
    saver.save(1, state_at(1), **FACTS)
    saver.save(2, state_at(2), **FACTS)
    saver.close()
    assert events.names == ["saved", "save_waited", "saved"]
    for step in (1, 2):
        assert torch.equal(loader.read_tensors(tmp_path, step)["weight"], state_at(step)["model.weight"])


def test_staging_memory_is_used_again(tmp_path: Path, state_at: StateAt) -> None:
    saver = Saver(tmp_path, CheckpointConfig())
    saver.save(1, state_at(1), **FACTS)
    saver.wait()
    places = {name: buffer.data_ptr() for name, buffer in saver._staged.items()}
    saver.save(2, state_at(2), **FACTS)
    assert {name: buffer.data_ptr() for name, buffer in saver._staged.items()} == places
    saver.close()


def test_the_manifest_says_what_was_saved(tmp_path: Path, state_at: StateAt) -> None:
    saver = Saver(tmp_path, CheckpointConfig(asynchronous=False))
    saver.save(
        8, state_at(8), progress={"tokens": 5}, config_hash="c", identity="i",
        mesh={"dp_shard": 1}, lease=4,
    )  # fmt: skip
    found = loader.find(tmp_path)
    assert found is not None
    manifest = found.manifest
    assert (manifest.step, manifest.lease, manifest.world_size) == (8, 4, 1)
    assert manifest.progress == {"tokens": 5}
    assert set(manifest.versions) == {"bigtrain", "torch", "python"}
    assert set(manifest.files) == {".metadata", "__0_0.distcp"}


def test_every_file_is_synced_after_its_last_byte(
    tmp_path: Path, state_at: StateAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, int] = {}
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    Saver(tmp_path, CheckpointConfig(asynchronous=False)).save(1, state_at(1), **FACTS)
    for path in [tmp_path / "LATEST", *(tmp_path / "step_00000001").iterdir()]:
        assert synced.get(path.stat().st_ino) == path.stat().st_size, path.name
    assert {tmp_path.stat().st_ino, (tmp_path / "step_00000001").stat().st_ino} <= synced.keys()


def test_no_path_of_the_machine_is_in_a_checkpoint(tmp_path: Path, state_at: StateAt) -> None:
    saver = Saver(tmp_path, CheckpointConfig(asynchronous=False))
    saver.save(8, state_at(8), **FACTS)
    for file in (tmp_path / "step_00000008").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_the_phases_come_in_order(tmp_path: Path, state_at: StateAt) -> None:
    phases: list[str] = []
    saver = Saver(tmp_path, CheckpointConfig(asynchronous=False), phase_hook=phases.append)
    saver.save(8, state_at(8), **FACTS)
    assert phases == list(PHASES)


def test_a_kill_in_any_phase_leaves_a_sound_checkpoint_and_nothing_else_once_cleaned(
    tmp_path: Path, run_script: Callable[..., str]
) -> None:
    report = json.loads(run_script("kill_in_each_phase.py", tmp_path))
    assert len(report) == 2 * len(PHASES)
    for name, left in report.items():
        phase, case = name.split("-")
        published = PHASES.index(phase) >= PHASES.index("rename")
        newest = 3 if case == "new" and published else 2
        assert left["killed"], name
        assert left["newest"] == left["newest_after_cleaning"] == newest, name
        assert left["warnings"] == [], name
        expected = {"LATEST", "step_00000001", "step_00000002"}
        if newest == 3:
            expected.add("step_00000003")
        if name == "prune-new":
            expected.remove("step_00000001")
        assert set(left["left"]) == expected, name
        weight = loader.read_tensors(tmp_path / name, newest)["weight"]
        wanted = -newest if published else newest
        assert torch.equal(weight, torch.full((1000,), float(wanted))), name


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_stops_nothing_and_the_next_one_works(
    tmp_path: Path, state_at: StateAt, asynchronous: bool
) -> None:
    events = Events()
    saver = Saver(tmp_path, CheckpointConfig(asynchronous=asynchronous), on_event=events)
    saver.save(1, state_at(1), **FACTS)
    saver.wait()
    with file_size_limit(3000):
        saver.save(2, state_at(2), **FACTS)
        outcome = saver.wait()
    assert outcome is not None
    assert outcome.status == "failed"
    assert "too large" in (outcome.cause or "")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["LATEST", "step_00000001"]
    assert saver.failures == 1
    saver.save(3, state_at(3), **FACTS)
    saver.close()
    assert saver.failures == 0
    assert events.names == ["saved", "save_failed", "saved"]
    assert commit.newest_verified(tmp_path) == (3, [])


def test_a_full_disk_fails_the_save_and_keeps_the_last_one(small_disk: Path) -> None:
    events = Events()
    directory = small_disk / "checkpoints"
    saver = Saver(directory, CheckpointConfig(keep_last=2), on_event=events)
    for step in (1, 2):
        saver.save(step, {"model.weight": torch.full((50_000,), step)}, **FACTS)
    saver.save(3, {"model.weight": torch.full((250_000,), 3)}, **FACTS)
    outcome = saver.wait()
    assert outcome is not None
    assert "No space left" in (outcome.cause or "")
    assert commit.newest_verified(directory) == (2, [])
    saver.save(4, {"model.weight": torch.full((10_000,), 4)}, **FACTS)
    saver.close()
    assert commit.newest_verified(directory) == (4, [])
    assert [name for name in events.names if name != "save_waited"] == ["saved"] * 2 + ["save_failed", "saved"]


def test_an_event_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path, state_at: StateAt) -> None:
    def full(event: str, /, **fields: Any) -> None:
        raise OSError(28, "No space left on device")

    saver = Saver(tmp_path, CheckpointConfig(), on_event=full)
    saver.save(1, state_at(1), **FACTS)
    outcome = saver.wait()
    assert outcome is not None
    assert outcome.status == "saved"


@pytest.mark.parametrize("stop_unsaved", [True, False])
def test_after_too_many_failures_the_run_warns_and_stops_if_configured(
    tmp_path: Path, state_at: StateAt, stop_unsaved: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints").write_text("a file where the directory should be")
    events = Events()
    config = CheckpointConfig(max_failed_saves=2, stop_unsaved=stop_unsaved)
    saver = Saver(tmp_path / "checkpoints", config, on_event=events)
    for step, must_stop in ((1, False), (2, stop_unsaved)):
        saver.save(step, state_at(step), **FACTS)
        saver.wait()
        assert saver.must_stop == must_stop
    assert events.names == ["save_failed", "save_failed", "unsaved"]
    assert "without a new checkpoint" in caplog.text


def test_a_read_only_directory_fails_the_save_alone(small_disk: Path, state_at: StateAt) -> None:
    saver = Saver(small_disk, CheckpointConfig(asynchronous=False))
    saver.save(1, state_at(1), **FACTS)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    saver.save(2, state_at(2), **FACTS)
    assert saver.last is not None
    assert "Read-only" in (saver.last.cause or "")
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert commit.newest_verified(small_disk) == (1, [])


def test_a_fenced_writer_publishes_nothing_and_must_stop(tmp_path: Path, state_at: StateAt) -> None:
    held = True
    events = Events()
    saver = Saver(tmp_path, CheckpointConfig(), may_publish=lambda: held, on_event=events)
    saver.save(1, state_at(1), **FACTS)
    saver.wait()
    held = False
    saver.save(2, state_at(2), **FACTS)
    saver.wait()
    assert saver.must_stop
    assert events.names == ["saved", "save_refused"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["LATEST", "step_00000001"]


def test_pruning_keeps_what_the_config_says(saved: Callable[..., Path]) -> None:
    directory = saved(1, 2, 3, 4, keep_last=2)
    assert [found.step for found in commit.list_checkpoints(directory)] == [3, 4]


def test_bytes_that_change_between_writing_and_reading_back_fail_the_save(tmp_path: Path, state_at: StateAt) -> None:
    def flip(phase: str) -> None:
        if phase == "publish" and armed:
            shard = tmp_path / "step_00000002" / "__0_0.distcp"
            content = bytearray(shard.read_bytes())
            content[100] ^= 1
            shard.write_bytes(content)

    armed = False
    saver = Saver(tmp_path, CheckpointConfig(asynchronous=False), phase_hook=flip)
    for step in (1, 2):
        saver.save(step, state_at(step), **FACTS)
    armed = True
    saver.save(2, state_at(3), **FACTS)
    assert saver.last is not None
    assert "differs from what was written" in (saver.last.cause or "")
    assert torch.equal(loader.read_tensors(tmp_path, 2)["weight"], state_at(2)["model.weight"])


STATE_MIB = 64
SLACK_MIB = 6.0
"""For what a save takes whatever the size of the state: threads, the chunk that is hashed."""


@pytest.mark.parametrize(
    ("kind", "layout", "first_mib", "next_mib"),
    [
        pytest.param("synchronous", "views", 0, 0, marks=pytest.mark.slow),
        pytest.param("asynchronous", "views", STATE_MIB, 0),
        pytest.param("synchronous", "whole", 0, 0, marks=pytest.mark.slow),
        pytest.param("asynchronous", "whole", STATE_MIB, 0, marks=pytest.mark.slow),
    ],
)
def test_a_save_takes_no_copy_of_the_state_and_in_the_background_one_that_is_used_again(
    tmp_path: Path, run_script: Callable[..., str], kind: str, layout: str, first_mib: int, next_mib: int
) -> None:
    first, again = json.loads(run_script("save_and_measure.py", tmp_path, kind, layout))
    assert first <= first_mib + SLACK_MIB
    assert again <= next_mib + SLACK_MIB
    if kind == "asynchronous":
        assert first > STATE_MIB - SLACK_MIB, "the measure sees no copy"


@pytest.mark.parametrize("read_back", [True, False])
def test_what_was_written_is_read_back_unless_that_is_turned_off(
    tmp_path: Path, state_at: StateAt, read_back: bool
) -> None:
    def harm(phase: str) -> None:
        if phase == "rename":
            shard = tmp_path / "step_00000002" / "__0_0.distcp"
            shard.write_bytes(shard.read_bytes()[:-1] + b"!")

    saver = Saver(tmp_path, CheckpointConfig(asynchronous=False, read_back=read_back))
    saver.save(1, state_at(1), permanent=True, **FACTS)
    saver._hook = harm
    saver.save(2, state_at(2), **FACTS)
    assert saver.last is not None
    assert saver.last.status == ("failed" if read_back else "saved")
    saver.close()
    found = loader.find(tmp_path)
    assert found is not None
    # What is not verified is not loaded, whether or not it was read back.
    assert (found.step, found.manifest.permanent) == (1, True)
    assert len(found.warnings) == (0 if read_back else 1)
