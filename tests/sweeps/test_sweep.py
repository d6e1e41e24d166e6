"""Whole sweeps of real runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.run import ExitCode, Lease, RunDirectory
from bigtrain.scaling.fit import fit
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.runs.wandb_offline import read_runs
from bigtrain.storage import read_lines
from bigtrain.sweeps.journal import SweepDirectory
from bigtrain.sweeps.status import sweep_status

Command = Callable[..., subprocess.CompletedProcess[str]]
WriteSweep = Callable[..., Path]
DEADLINE_S = 600.0
WANDB_FILES = "wandb/*run-*/*.wandb"
A3 = FitOptions(approach="a3", loss_function="huber", replicates=100, processes=1)


def metrics(run: Path) -> dict[int, tuple[float, float | None]]:
    return {row["step"]: (row["loss"], row.get("val_loss")) for row in read_lines(run / "metrics.jsonl")}


@pytest.mark.slow
def test_trunk_and_branch_are_the_separate_run_to_the_bit(
    bigtrain: Command, write_sweep: WriteSweep, tmp_path: Path
) -> None:
    """A branch's config without its `init` is that of the run which trains the whole schedule by itself."""
    done = bigtrain("sweep", "run", write_sweep(sizes=[3000], tokens_per_param=[1.2, 2.4]))
    assert done.returncode == ExitCode.FINISHED, done.stderr
    assert "less than separate runs'" in done.stderr
    directory = SweepDirectory(tmp_path / "runs" / "tiny")
    status = json.loads(bigtrain("sweep", "status", "tiny", "--json").stdout)
    assert status == sweep_status(directory)
    assert (status["state"], status["finished"]) == ("finished", 3)
    trunk, *branches = [row["trial"] for row in status["trials"]]
    # Three trials on two slots: at least one began on the agent of the trial before.
    begun = [event for name in (trunk, *branches) for event in read_lines(directory.run(name).events)]
    assert [event["kept"] for event in begun if event["event"] == "placed"].count(True) >= 1
    assert 0 < status["flops_saved"] < status["flops"]
    longest = branches[-1]
    config = yaml.safe_load((directory.configs / f"{longest}.yaml").read_text())
    logs = json.loads(bigtrain("sweep", "logs", "tiny", longest, "--json").stdout)
    assert f"{longest}: finished" in logs["text"]
    assert logs["ranks"]
    assert bigtrain("sweep", "logs", "tiny", f"{longest}0").returncode == ExitCode.USER
    parent, begins = config["init"]["source"].rsplit("@", 1)
    assert parent == trunk
    alone = tmp_path / "alone.yaml"
    alone.write_text(yaml.safe_dump({**config, "name": "alone", "init": {}}))
    assert bigtrain("train", alone).returncode == ExitCode.FINISHED
    separate = metrics(tmp_path / "runs" / "alone")
    shared = {**metrics(directory.run(trunk).path), **metrics(directory.run(longest).path)}
    assert {step: loss for step, (loss, _) in shared.items()} == {step: loss for step, (loss, _) in separate.items()}
    last = max(separate)
    assert int(begins) < last
    assert shared[last] == separate[last]
    assert shared[last][1] is not None
    states = [read_tensors(run.checkpoints, last, prefix="")
              for run in (directory.run(longest), RunDirectory(tmp_path / "runs" / "alone"))]  # fmt: skip
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Sweeping:
    """A `bigtrain sweep run` in a process of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.process: subprocess.Popen[str] | None = None

    def start(self, sweep: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bigtrain.cli", "sweep", "run", str(sweep)]
        self.process = subprocess.Popen(command, cwd=self.place, stderr=subprocess.PIPE, text=True)
        return self.process


@pytest.fixture
def sweeping(tmp_path: Path) -> Iterator[Sweeping]:
    found = Sweeping(tmp_path)
    yield found
    if found.process is not None and found.process.poll() is None:
        found.process.kill()
        found.process.communicate()


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def lose_the_end(run: RunDirectory) -> None:
    """As a kill after the last save leaves a run: W&B has not written its last steps, nobody said that it is over."""
    for file in run.path.glob(WANDB_FILES):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    events = [line for line in read_lines(run.events) if line["event"] != "finished"]
    run.events.write_text("".join(json.dumps(line) + "\n" for line in events))


def finished_once(directory: SweepDirectory) -> list[str]:
    """The trials that finished, none of them twice, or started again afterwards, or with a step done twice."""
    lines = list(read_lines(directory.journal))
    finished = [line["trial"] for line in lines if line["event"] == "finished"]
    assert len(finished) == len(set(finished))
    for name in finished:
        last = max(i for i, line in enumerate(lines) if line["event"] == "started" and line["trial"] == name)
        end = next(i for i, line in enumerate(lines) if line["event"] == "finished" and line["trial"] == name)
        assert last < end
        steps = [row["step"] for row in read_lines(directory.run(name).metrics)]
        assert len(steps) == len(set(steps))
    return finished


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_killed_twice_ends_in_a_law_that_its_wandb_files_give_too(
    bigtrain: Command, sweeping: Sweeping, write_sweep: WriteSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    base = yaml.safe_load(write_sweep().read_text())["base"]
    # A trunk with two branches, and sizes of one length: six points at three N and more by seven trials.
    sizes = [{"params": 3000, "tokens_per_param": [2, 6]}]
    sizes += [{"params": n, "tokens_per_param": [ratio]} for n, ratio in ((1300, 10), (2000, 3), (4500, 5), (6000, 2))]
    path = write_sweep(
        sizes=sizes,
        base={**base, "tracking": {"wandb": "offline"}, "evaluation": {"every": "100000 steps", "sequences": 64}},
    )  # fmt: skip
    directory = SweepDirectory(tmp_path / "runs" / "tiny")
    first = sweeping.start(path)

    def launcher() -> int | None:
        """Of a trial that has taken some steps, and whose W&B files are there."""
        started = [line["trial"] for line in read_lines(directory.journal) if line["event"] == "started"]
        for run in map(directory.run, started):
            holder = Lease.holder(run)
            steps = len(list(read_lines(run.metrics)))
            if steps > 5 and list(run.path.glob(WANDB_FILES)) and holder is not None and holder.alive():
                return holder.pid
        return None

    os.kill(wait_for(launcher), signal.SIGKILL)
    wait_for(lambda: [line for line in read_lines(directory.journal) if line.get("retry") is True])
    wait_for(lambda: [line for line in read_lines(directory.journal) if line["event"] == "finished"])
    first.kill()
    first.communicate()
    _, said = sweeping.start(path).communicate(timeout=DEADLINE_S)
    assert sweeping.process is not None
    assert sweeping.process.returncode == ExitCode.FINISHED, said
    finished = finished_once(directory)
    assert len(finished) == 7
    fitted = fit(str(directory.path), A3)
    lose_the_end(directory.run(finished[-1]))
    again = bigtrain("train", directory.run(finished[-1]).config, "--runs-dir", directory.trials)
    assert again.returncode == ExitCode.FINISHED, again.stderr
    # W&B's files hold every trial under the sweep's group, and give the same fit.
    runs = {run.name: run for run in read_runs(directory.trials)}
    assert runs.keys() == set(finished)
    assert {run.group for run in runs.values()} == {"tiny"}
    where = FitOptions(**{**A3.__dict__, "where": "phase == decayed"})
    shown = fit(str(directory.trials), where)
    assert len(fitted.table) == 6
    assert shown.law["source"]["data_hash"] == fitted.law["source"]["data_hash"]
    assert shown.law["approaches"] == fitted.law["approaches"]
    # The law is a run of its own, with its plots.
    (own,) = read_runs(directory.law)
    assert own.group == "tiny"
    written = json.loads((directory.law / "law.json").read_text())
    primary = written["primary"]
    assert own.row()[f"{primary}/alpha"] == written["approaches"][primary]["alpha"]
    assert list(directory.law.glob("wandb/*run-*/files/media/html/*.html"))
    assert (directory.law / "law.html").exists()
    shutil.rmtree(directory.path)
