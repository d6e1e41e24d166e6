"""Runs in a Slurm job; Slurm itself is stood in for (slurm_commands.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.config import UserError
from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.launch import launch_here, run_controlled
from bigtrain.jobs.placer_kinds import kind_of
from bigtrain.jobs.placers.slurm import SlurmPlacer
from bigtrain.storage import read_lines

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("slurm_commands", Path(__file__).with_name("slurm_commands.py"))
assert _spec is not None
assert _spec.loader is not None
slurm_commands = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(slurm_commands)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three nodes that are processes of this machine, and this test as their batch script."""
    slurm = slurm_commands.Slurm(tmp_path / "slurm", nodes=3)
    for name, value in slurm.environment().items():
        monkeypatch.setenv(name, value)
    return slurm


def run(job: Any, placer: SlurmPlacer, nodes: int, nproc: int = 1) -> int:
    """Two ranks of tests/jobs/conftest.py on the placer's nodes."""

    def event(event: str, /, **fields: Any) -> None:
        job.events.append({"event": event, **fields})

    return run_controlled(
        job.path, placer, nproc=nproc, job=JobConfig(nodes=nodes), event=event, rank_module="tiny_rank",
        environment=job.environment(), say=job.said.append,
    )  # fmt: skip


def placer_of(job: Any, *sizes: int, **options: Any) -> SlurmPlacer:
    return SlurmPlacer(sizes, job.path / "logs" / "agent.log", say=job.said.append, **options)


def test_ranks_follow_the_nodes_of_the_allocation_and_the_token_stays_out_of_sight(job: Any, slurm: Any) -> None:
    job.write_rank("""
print("at", os.environ["SLURMD_NODENAME"], os.environ["GROUP_RANK"], os.environ["LOCAL_RANK"])
print("world", os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"] != "")
print("secrets", [name for name in os.environ if "JOB_TOKEN" in name or "BIGTRAIN_CONTROLLER" in name])
train(3)
""")
    assert run(job, placer_of(job, 3), nodes=3, nproc=2) == 0
    for rank in range(6):
        log = job.log(0, rank)
        assert f"at {slurm.nodes[rank // 2]} {rank // 2} {rank % 2}" in log
        assert "world 6 True" in log
        assert "secrets []" in log
    [arguments] = read_arguments(slurm)
    assert "--ntasks-per-node=1" in arguments
    assert arguments[-2:] == ["-m", "bigtrain.jobs.agent"]
    assert not any(len(argument) == 64 for argument in arguments), "the token is among the arguments"


def read_arguments(slurm: Any) -> list[list[str]]:
    return [json.loads(line) for line in (slurm.state / "srun.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["down", "silent"])
def test_a_lost_node_is_reported_and_a_spare_one_takes_its_place(job: Any, slurm: Any, how: str) -> None:
    job.write_rank(f"""
def lose(step):
    if attempt == 0 and rank == 1 and step == 5:
        Path({str(slurm.state)!r}, {how!r}).write_text(os.environ["SLURMD_NODENAME"])
        os.kill(os.getppid(), signal.SIGKILL)
print("at", os.environ["SLURMD_NODENAME"])
train(20 if attempt else 10**6, at=lose)
""")
    assert run(job, placer_of(job, 2, straggler_s=1.0), nodes=2) == 0
    assert "at 127.0.0.3" in job.log(0, 1)
    assert "at 127.0.0.2" in job.log(1, 0)
    assert "at 127.0.0.4" in job.log(1, 1)
    [fault] = job.named("fault")
    assert "is lost" in fault["cause"]
    assert any("127.0.0.3" in line and line.endswith(": continuing without it") for line in job.said)


@pytest.mark.slow
def test_without_a_spare_node_the_run_says_which_are_lost(job: Any, slurm: Any) -> None:
    job.write_rank(f"""
def lose(step):
    if attempt == 0 and rank == 2 and step == 5:
        Path({str(slurm.state)!r}, "down").write_text(os.environ["SLURMD_NODENAME"])
        os.kill(os.getppid(), signal.SIGKILL)
train(10**6, at=lose)
""")
    assert run(job, placer_of(job, 3), nodes=3) == 1
    assert any("needs at least 3 nodes, but job 4711 has 2 left: 127.0.0.4 lost" in line for line in job.said)


@pytest.mark.slow
def test_a_run_that_may_shrink_goes_on_with_the_nodes_that_are_left(job: Any, slurm: Any) -> None:
    job.write_rank(f"""
def lose(step):
    if attempt == 0 and rank == 1 and step == 5:
        Path({str(slurm.state)!r}, "down").write_text(os.environ["SLURMD_NODENAME"])
        os.kill(os.getppid(), signal.SIGKILL)
print("at", os.environ["SLURMD_NODENAME"], "of", os.environ["WORLD_SIZE"])
train(20 if attempt else 10**6, at=lose)
""")
    assert run(job, placer_of(job, 1, 2, 3), nodes=3) == 0
    assert "at 127.0.0.2 of 2" in job.log(1, 0)
    assert "at 127.0.0.4 of 2" in job.log(1, 1)
    assert any("continuing with 2 of 3 nodes" in line for line in job.said)


@pytest.mark.slow
def test_an_agent_that_no_longer_answers_goes_with_its_step(job: Any, slurm: Any) -> None:
    job.write_rank("""
def stop_agent(step):
    if attempt == 0 and rank == 1 and step == 5:
        os.kill(os.getppid(), signal.SIGSTOP)
train(20 if attempt else 10**6, at=stop_agent)
""")
    assert run(job, placer_of(job, 2, silence_s=1.5), nodes=2) == 0
    assert len(read_arguments(slurm)) == 2


def test_a_job_without_srun_says_so(job: Any, slurm: Any) -> None:
    (slurm.state / "bin" / "srun").unlink()
    (job.path / "logs").mkdir()
    assert run(job, placer_of(job, 2), nodes=2) == 1
    assert any("srun cannot be run" in line for line in job.said)


def test_more_nodes_than_the_job_has_are_refused(slurm: Any) -> None:
    with pytest.raises(UserError, match="this Slurm job has 3"):
        kind_of(JobConfig(nodes=4)).procs(JobConfig(nodes=4))


@pytest.mark.parametrize("refused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_signal_before_the_limit_saves_and_requeues(job: Any, slurm: Any, refused: bool) -> None:
    job.write_rank("train(10**6)")
    if refused:
        (slurm.state / "no_requeue").touch()

    def signal_when_running() -> None:
        job.noted("started", 0, 1)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=signal_when_running)
    thread.start()
    code = launch_here(
        job.path, nproc=1, job=JobConfig(nodes=2), event=lambda event, /, **fields: None, rank_module="tiny_rank",
        environment=job.environment(), say=job.said.append,
    )  # fmt: skip
    thread.join()
    assert code == 75
    assert (slurm.state / "requeued").exists() is not refused
    assert any(("could not be requeued" if refused else "is back in the queue") in line for line in job.said)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.slow
def test_the_sbatch_file_trains_through_its_time_limit_to_the_bits_of_one_machine(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(duration="40 steps", checkpoint={"every": "10 steps"}, evaluation={"every": "20 steps"})
    command = [sys.executable, "-m", "bigtrain.cli", "train", str(config), "--name", "clean", "--nproc", "2"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=240)
    slurm = slurm_commands.Slurm(tmp_path / "slurm", nodes=2)
    directory = tmp_path / "runs" / "tiny"
    code = slurm.sbatch(
        ROOT / "launch" / "slurm.sbatch", str(config), "checkpoint.every=7 steps",
        limit=lambda restarts: restarts == 0 and (directory / "checkpoints" / "step_00000007").exists(),
        cwd=tmp_path, output=tmp_path / "slurm.log",
    )  # fmt: skip
    said = (tmp_path / "slurm.log").read_text()
    assert code == 0, said
    assert "job 4711 is back in the queue" in said
    assert [event["event"] for event in read_lines(directory / "events.jsonl") if event["event"] in ENDS] == [
        "started", "stopped", "resumed", "finished",
    ]  # fmt: skip
    expected = read_tensors(tmp_path / "runs" / "clean" / "checkpoints", 40, prefix="")
    found = read_tensors(directory / "checkpoints", 40, prefix="")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    clean, logged = (list(read_lines(run / "samples.jsonl")) for run in (tmp_path / "runs" / "clean", directory))
    assert logged == clean


ENDS = ("started", "resumed", "fault", "restarted", "stopped", "finished", "failed")
