from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from bigtrain.tracking.config import PICTURE_KEY, TrackedRun, TrackingConfig
from bigtrain.tracking.process import QUEUE_SIZE, TrackerProcess, Trackers
from bigtrain.tracking.trackers.wandb import (
    INIT_TIMEOUT_S,
    WandbConfig,
    choose_mode,
    has_key,
    read_url,
    run_id,
    send_alert,
)

PUT_LIMIT_S = 1e-3
"""Processor time that a step may pay for its metrics: far under the shortest step, far over a queue's own cost."""
WAIT_LIMIT_S = 0.1
"""How long it may take by the clock on a busy machine: far under the least that a server keeps one waiting here."""

CLOSE_LIMIT_S = 20.0
"""Of a close that may wait 0.5 s, on a busy machine; a server that hangs would keep it for ever."""

CANARY = "canary-7f3a"


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def wandb_tracker(
    run_dir: Path,
    config: dict[str, Any],
    *,
    mode: str = "offline",
    warn: Callable[[str], None] = print,
    queue_size: int = QUEUE_SIZE,
    init_timeout_s: float = INIT_TIMEOUT_S,
) -> TrackerProcess:
    keys = WandbConfig.model_validate({"mode": mode, "init_timeout_s": init_timeout_s})
    return TrackerProcess(keys, TrackedRun(run_dir, "tiny", config), warn=warn, queue_size=queue_size)


def put_all_at_no_cost(tracker: TrackerProcess, count: int) -> None:
    """Put so many steps; the median of their times is held to the limits."""
    spent, passed = [], []
    for step in range(1, count + 1):
        before = time.thread_time(), time.perf_counter()
        tracker.put({"step": step, "loss": 1.0 / step, "mfu": None, "grad_norm": float("nan")})
        spent.append(time.thread_time() - before[0])
        passed.append(time.perf_counter() - before[1])
    assert sorted(spent)[count // 2] < PUT_LIMIT_S
    assert sorted(passed)[count // 2] < WAIT_LIMIT_S


def test_offline_files_hold_the_logged_values_and_resume_under_the_same_id(
    run_dir: Path,
    wandb_history: Callable[[Path], list[dict[str, Any]]],
    read_wandb: Callable[[Path], list[Any]],
) -> None:
    """... pictures too, and git, code and the console are not captured."""
    ids = []
    Image.new("L", (3, 2)).save(run_dir / "drawn.png")
    pictures = {"samples": {PICTURE_KEY: str(run_dir / "drawn.png")}, "lost": {PICTURE_KEY: str(run_dir / "lost.png")}}
    for steps in ((1, 2, 3), (4,)):
        tracker = Trackers(run_dir, "tiny", {"seed": 1337}, TrackingConfig(tags=["first"]))
        for step in steps:
            tracker.put({"step": step, "loss": 1.0 / step, "mfu": None, "grad_norm": float("nan"), **pictures})
        tracker.close(30)
        ids.append(run_id(run_dir, "tiny"))
    rows = wandb_history(run_dir)
    assert [(row["_step"], row["loss"]) for row in rows] == [(step, 1.0 / step) for step in (1, 2, 3, 4)]
    assert [row["samples.width"] for row in rows] == [3] * 4
    assert not [name for row in rows for name in row if name.startswith("lost")]
    assert all("mfu" not in row and "grad_norm" not in row for row in rows)
    runs = [record.run for record in read_wandb(run_dir) if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == set(ids)
    assert len(set(ids)) == 1
    assert runs[0].display_name == "tiny"
    assert list(runs[0].tags) == ["first"]
    assert runs[0].project == "bigtrain"
    assert read_url(run_dir) is None
    assert not {record.WhichOneof("record_type") for record in read_wandb(run_dir)} & {"output", "output_raw"}
    assert not runs[0].git.remote_url
    assert not runs[0].git.commit
    assert not list(run_dir.rglob("*.py"))


def test_a_server_that_hangs_costs_no_step_and_the_run_goes_on_offline(
    run_dir: Path, wandb_server: Callable[[str], Any], wandb_history: Callable[[Path], list[dict[str, Any]]],
    eventually: Callable[[Callable[[], bool]], None],
) -> None:  # fmt: skip
    warnings: list[str] = []
    with wandb_server("hang") as asked:
        tracker = wandb_tracker(run_dir, {}, mode="online", warn=warnings.append, init_timeout_s=0.5)
        eventually(lambda: bool(asked))
        put_all_at_no_cost(tracker, 500)
        tracker.close(30)
    assert tracker.dropped == 0
    assert len(warnings) == 1
    assert "continuing offline" in warnings[0]
    assert len(wandb_history(run_dir)) == 500


@pytest.mark.slow
def test_a_server_that_answers_500_leaves_the_run_offline_with_one_warning(
    run_dir: Path, wandb_server: Callable[[str], Any], wandb_history: Callable[[Path], list[dict[str, Any]]]
) -> None:
    warnings: list[str] = []
    with wandb_server("500"):
        tracker = wandb_tracker(run_dir, {}, mode="online", warn=warnings.append, init_timeout_s=0.5)
        put_all_at_no_cost(tracker, 5)
        tracker.close(30)
    assert len(warnings) == 1
    assert "\n" not in warnings[0]
    assert [row["_step"] for row in wandb_history(run_dir)] == [1, 2, 3, 4, 5]


def test_closing_while_the_server_hangs_ends_within_its_limit_and_leaves_no_process(
    run_dir: Path, wandb_server: Callable[[str], Any], eventually: Callable[[Callable[[], bool]], None]
) -> None:
    warnings: list[str] = []
    others = set(psutil.Process().children(recursive=True))
    with wandb_server("hang") as asked:
        tracker = wandb_tracker(run_dir, {}, mode="online", warn=warnings.append, queue_size=8)
        eventually(lambda: bool(asked))
        started = set(psutil.Process().children(recursive=True)) - others
        assert started
        put_all_at_no_cost(tracker, 50)
        assert tracker.dropped == 42, "eight wait, the rest is dropped and counted"
        before = time.monotonic()
        tracker.close(0.5)
        assert time.monotonic() - before < CLOSE_LIMIT_S
        eventually(lambda: not any(child.is_running() and child.status() != "zombie" for child in started))
    assert tracker.dropped == 50
    assert sum("50 steps were not sent" in line for line in warnings) == 1
    assert sum("did not finish" in line for line in warnings) == 1
    assert len(warnings) == 2


def test_the_tracking_process_dying_in_mid_run_becomes_one_warning(
    run_dir: Path, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    warnings: list[str] = []
    tracker = wandb_tracker(run_dir, {}, warn=warnings.append)
    tracker.put({"step": 1, "loss": 1.0})
    eventually(lambda: bool(list(run_dir.glob("wandb/offline-run-*/*.wandb"))))
    child = next(c for c in psutil.Process().children() if "bigtrain.tracking.tracker_process" in c.cmdline())
    child.kill()
    child.wait(5)
    for step in range(2, 200):
        tracker.put({"step": step, "loss": 1.0})
    tracker.close(10)
    assert sum("W&B is disabled from now on" in line for line in warnings) == 1
    assert all("\n" not in line for line in warnings)
    assert tracker.dropped > 0


def test_no_secret_reaches_a_file_or_an_argument_list(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY.ljust(40, "0"))
    config = {
        "data": {
            "train": f"s3://me:{CANARY}@bucket/x",
            "validation": f"https://h/x?X-Amz-Signature={CANARY}",
        },
        "job": {"HF_TOKEN": CANARY, "passthrough": [{"db_password": CANARY}]},
        "seed": 1337,
    }
    tracker = wandb_tracker(run_dir, config)
    tracker.put({"step": 1, "loss": 1.0})
    eventually(lambda: bool(list(run_dir.glob("wandb/offline-run-*/*.wandb"))))
    for child in psutil.Process().children(recursive=True):
        assert CANARY not in " ".join(child.cmdline())
    tracker.close(30)
    files = [file for file in run_dir.rglob("*") if file.is_file()]
    contents = {file: file.read_bytes() for file in files}
    assert any(b"1337" in content for content in contents.values())
    assert [file for file, content in contents.items() if CANARY.encode() in content] == []


def test_mode_is_online_only_with_a_key(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert choose_mode("auto", home) == "offline"
    assert choose_mode("auto", {**home, "WANDB_API_KEY": "k"}) == "online"
    assert choose_mode("auto", {**home, "WANDB_API_KEY": "k", "WANDB_MODE": "offline"}) == "offline"
    assert choose_mode("disabled", {**home, "WANDB_API_KEY": "k"}) == "disabled"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password p\n")
    assert has_key(home)
    assert not has_key({**home, "WANDB_BASE_URL": "https://wandb.example.org"})


def test_disabled_tracking_writes_nothing(run_dir: Path) -> None:
    tracker = Trackers(run_dir, "tiny", {}, TrackingConfig(wandb="disabled"))
    tracker.put({"step": 1, "loss": 1.0})
    tracker.close(1)
    assert list(run_dir.iterdir()) == []


def test_two_runs_of_one_name_have_different_ids_and_legal_ones(tmp_path: Path) -> None:
    first, second = run_id(tmp_path / "a", "my run/ü#1" + "x" * 100), run_id(tmp_path / "b", "my run/ü#1")
    assert first != second
    assert len(first) <= 64
    assert not set("/\\#?%: ") & set(first)
    assert run_id(tmp_path / "a", "renamed") == first


@pytest.mark.slow
def test_an_alert_is_in_the_runs_file_where_the_server_hangs(
    run_dir: Path, wandb_server: Callable[[str], Any], read_wandb: Callable[[Path], list[Any]]
) -> None:
    with wandb_server("hang"):
        said = send_alert(
            run_dir, {"name": "tiny"}, TrackingConfig(), title="tiny: failed", text="rank 1 was killed", failed=True,
            timeout_s=60.0, init_timeout_s=2.0,
        )  # fmt: skip
    assert said is not None
    assert "continuing offline" in said
    [alert] = [record.alert for record in read_wandb(run_dir) if record.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.text, alert.level) == ("tiny: failed", "rank 1 was killed", "ERROR")
