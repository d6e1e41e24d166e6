"""Runs of real ranks in which faults are planted, held against an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.storage import read_lines

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = 24
SAVE_EVERY = 7
DEADLINE_S = 600.0


@dataclass
class Workplace:
    """A directory with a config and its runs."""

    path: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(
        self, name: str, *arguments: object, fault: dict[str, Any] | None = None, limit_s: float | None = None
    ) -> subprocess.Popen[str]:
        """Start faulty_train.py; `limit_s` is how long its ranks may be silent in a step, thrice that in a save.

        The limit of a save holds for a rank's end as well, which takes long on a busy machine.
        """
        config = yaml.safe_load((self.path / "config.yaml").read_text())
        if limit_s is not None:
            config["job"] = {"limits": {"step": limit_s, "save": 3 * limit_s}}
        (self.path / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if fault is not None:
            environment |= {
                "BIGTRAIN_FAULT": json.dumps(fault),
                "BIGTRAIN_FAULT_FILE": str(self.path / f"{name}.fault"),
            }
        process = subprocess.Popen(
            [
                sys.executable,
                str(HERE / "faulty_train.py"),
                str(self.path / f"{name}.yaml"),
                name,
                *map(str, arguments),
            ],
            cwd=self.path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.started.append(process)
        return process

    def end(self) -> None:
        """End what a failed test has left running; its ranks end with it."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()

    def finish(self, process: subprocess.Popen[str], code: int = 0) -> str:
        """Wait for its end; what it said."""
        said, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == code, said
        return said

    def run(self, name: str) -> Path:
        """The directory of a run."""
        return self.path / "runs" / name

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [event for event in read_lines(self.run(name) / "events.jsonl") if event["event"] == kind]

    def losses(self, name: str) -> dict[int, float]:
        """The loss of each step."""
        return {row["step"]: row["loss"] for row in read_lines(self.run(name) / "metrics.jsonl")}

    def samples(self, name: str) -> list[Any]:
        """What each step consumed."""
        return list(read_lines(self.run(name) / "samples.jsonl"))

    def assert_same(self, name: str, undisturbed: str) -> None:
        """Weights, optimizer, samples and losses agree to the bit."""
        found, expected = (read_tensors(self.run(run) / "checkpoints", STEPS, prefix="") for run in (name, undisturbed))
        assert found.keys() == expected.keys()
        assert not [key for key in found if not torch.equal(found[key], expected[key])]
        assert self.samples(name) == self.samples(undisturbed)
        assert self.losses(name) == self.losses(undisturbed)

    def assert_nothing_left(self, name: str) -> None:
        """No process carries the run's directory, and no temporary file lies in it."""
        mark = f"BIGTRAIN_RUN={self.run(name)}".encode()
        deadline = time.monotonic() + 20
        while left := [pid for pid in filter(str.isdigit, os.listdir("/proc")) if mark in _environment(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        assert not list(self.run(name).rglob("*.tmp-*"))


def _environment(pid: str) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


@pytest.fixture(scope="session")
def make_workplace(text_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Workplace]]:
    """Makes a workplace whose config has some sections of its own."""
    made: list[Workplace] = []

    def make(**sections: Any) -> Workplace:
        config = {
            "name": "tiny",
            "model": {
                "arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 32, "tied": True,
                "dropout": 0.1,
            },
            "data": {"train": str(text_shards / "train"), "validation": str(text_shards / "validation")},
            "batch": {"size": 12},
            "duration": f"{STEPS} steps",
            "precision": "fp32",
            "evaluation": {"every": "10 steps", "batches": 2},
            "checkpoint": {"every": f"{SAVE_EVERY} steps"},
            "streaming": {"log_samples": True},
            "tracking": {"wandb": "disabled"},
            **sections,
        }  # fmt: skip
        path = tmp_path_factory.mktemp("faults")
        (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        made.append(Workplace(path))
        return made[-1]

    yield make
    for workplace in made:
        workplace.end()


@pytest.fixture(scope="session")
def two_ranks(make_workplace: Callable[..., Workplace]) -> Workplace:
    """A workplace with an undisturbed run of two ranks, which each test leaves as it is."""
    workplace = make_workplace()
    workplace.finish(workplace.start("undisturbed", 2))
    return workplace
