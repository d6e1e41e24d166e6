"""Faults of what surrounds a run: the clock, W&B. Each run must end as an undisturbed one does, and tell no secret."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.storage import read_lines
from bigtrain.tracking.goodput import goodput
from bigtrain.tracking.history import read_columns, read_events

STEPS, SAVE_EVERY = 150, 25
DEADLINE_S = 280.0
WANDB_KEY = "canary1" + "7" * 33
HF_KEY = "hf_canary2" + "8" * 30
HOUR_S = 3600

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def config(text_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seconds."""
    path = tmp_path_factory.mktemp("environment") / "run.yaml"
    model = {"arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 32, "tied": True}
    sections = {
        "name": "tiny", "model": model, "batch": {"size": 4}, "duration": f"{STEPS} steps", "precision": "fp32",
        "data": {"train": str(text_shards / "train"), "validation": str(text_shards / "validation")},
        "evaluation": {"every": "50 steps", "batches": 2}, "checkpoint": {"every": f"{SAVE_EVERY} steps"},
        "streaming": {"log_samples": True}, "tracking": {"wandb": "disabled"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(sections))
    return path


class Run:
    """A run in a process of its own, with keys in its environment that must not be seen anywhere."""

    def __init__(self, config: Path, runs: Path, name: str, *overrides: str, **variables: str) -> None:
        self.path = runs / name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bigtrain.cli", "train", str(config), *overrides, "--name", name,
             "--runs-dir", str(runs), "--nproc", "1"],
            env=os.environ | {"WANDB_API_KEY": WANDB_KEY, "HF_TOKEN": HF_KEY, **variables},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.output = ""

    def wait_for_save(self, step: int) -> None:
        """Wait for the checkpoint of a step, and look at all command lines meanwhile."""
        deadline = time.monotonic() + DEADLINE_S
        while not (self.path / "checkpoints" / f"step_{step:08d}").exists():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            assert_no_canary(b"\0".join(read(path) for path in Path("/proc").glob("[0-9]*/cmdline")), "a command line")
            time.sleep(0.005)

    def finish(self) -> None:
        """Wait for a clean end and search all that is left for secrets."""
        self.output, _ = self.process.communicate(timeout=DEADLINE_S)
        assert self.process.returncode == 0, self.output
        assert_no_canary(self.output.encode(), "the output")
        for path in self.path.rglob("*"):
            if path.is_file():
                assert_no_canary(read(path), str(path))

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_lines(self.path / "events.jsonl") if event["event"] == name]

    def assert_equals(self, clean: Run) -> None:
        """Weights, optimizer, samples and losses are those of the undisturbed run; no fault, nothing left behind."""
        state, clean_state = (read_tensors(run.path / "checkpoints", STEPS, prefix="") for run in (self, clean))
        assert state.keys() == clean_state.keys()
        assert all(state[name].equal(clean_state[name]) for name in clean_state)
        for file, keys in (("samples.jsonl", ("step", "ids")), ("metrics.jsonl", ("step", "loss", "val_loss"))):
            found, expected = (
                [[row.get(key) for key in keys] for row in read_lines(run.path / file)] for run in (self, clean)
            )
            assert found == expected
        assert not self.events("fault")
        assert processes_of(self) == []


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def assert_no_canary(data: bytes, where: str) -> None:
    for canary in (WANDB_KEY, HF_KEY):
        assert canary.encode() not in data, f"a secret is in {where}"


def processes_of(run: Run, word: str = "") -> list[int]:
    """Living processes that name the run in their environment or command line, and `word` in the latter."""
    mark, found = str(run.path).encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        command = read(place / "cmdline")
        if word.encode() in command and (mark in command or b"BIGTRAIN_RUN=" + mark in read(place / "environ")):
            found.append(int(place.name))
    return found


@pytest.fixture(scope="module")
def clean(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run undisturbed."""
    run = Run(config, tmp_path_factory.mktemp("clean"), "clean")
    run.finish()
    return run


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clock.c as a library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler, to stand between the processes and the time of day")
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, source], check=True)
    return library


def test_a_clock_that_jumps_an_hour_changes_nothing(config: Path, clean: Run, preload: Path, tmp_path: Path) -> None:
    offset = tmp_path / "offset"
    offset.write_bytes(struct.pack("q", 0))
    limits = "job.limits={start: 60, step: 30, save: 30, evaluation: 30}"
    run = Run(config, tmp_path, "jumped", limits, LD_PRELOAD=str(preload), CLOCK_OFFSET_FILE=str(offset))

    def set_clock(seconds: int) -> None:
        with open(offset, "r+b") as file:
            file.write(struct.pack("q", seconds))

    run.wait_for_save(SAVE_EVERY)
    set_clock(HOUR_S)
    run.wait_for_save(3 * SAVE_EVERY)
    set_clock(0)
    run.finish()
    run.assert_equals(clean)
    times = [event["time"] for event in read_lines(run.path / "events.jsonl")]
    steps = [after - before for before, after in itertools.pairwise(times)]
    assert max(steps) > HOUR_S / 2, "the clock was not moved forward"
    assert min(steps) < -HOUR_S / 2, "the clock was not moved back"
    spent = goodput(read_events(run.path / "events.jsonl"), read_columns(run.path / "metrics.jsonl"), 0.0)
    assert 0 < spent.wall_s < DEADLINE_S
    rates = [row["tokens_per_s"] for row in read_lines(run.path / "metrics.jsonl")]
    assert min(rates) > 0


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_wandb_that_hangs_costs_the_run_nothing(config: Path, clean: Run, silent_server: str, tmp_path: Path) -> None:
    run = Run(config, tmp_path, "hangs", "tracking.wandb=online", WANDB_BASE_URL=silent_server)
    run.wait_for_save(SAVE_EVERY)
    run.finish()
    run.assert_equals(clean)
    # Were each step to wait for the server, the steps would take minutes.
    assert busy_s(run) < 60


def test_a_wandb_that_dies_in_mid_run_costs_the_run_nothing(config: Path, clean: Run, tmp_path: Path) -> None:
    """Without a key, so offline; the process that talks to W&B is killed while steps go on."""
    run = Run(config, tmp_path, "dies", "tracking.wandb=auto", WANDB_API_KEY="", HOME=str(tmp_path))
    run.wait_for_save(SAVE_EVERY)
    tracker = children_of_ranks(run)
    for pid in tracker:
        os.kill(pid, signal.SIGKILL)
    run.finish()
    assert tracker
    run.assert_equals(clean)
    assert busy_s(run) < 60


def children_of_ranks(run: Run) -> list[int]:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := processes_of(run, "tracker_process")):
        assert time.monotonic() < deadline
        assert run.process.poll() is None
        time.sleep(0.005)
    return found


def busy_s(run: Run) -> float:
    """Seconds from the first step to the last."""
    spent = goodput(read_events(run.path / "events.jsonl"), read_columns(run.path / "metrics.jsonl"), 0.0)
    return spent.steps_s + spent.lost_s["data"] + spent.lost_s["saves"] + spent.lost_s["evaluation"]


def test_the_search_for_secrets_finds_one(tmp_path: Path) -> None:
    (tmp_path / "leak.json").write_text(json.dumps({"config": {"key": WANDB_KEY}}))
    with pytest.raises(AssertionError, match="a secret is in"):
        assert_no_canary(read(tmp_path / "leak.json"), "leak.json")
