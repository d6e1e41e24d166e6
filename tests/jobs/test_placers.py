"""Placers as an extension point: each registered one, and one that a plugin brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import UserError
from bigtrain.config.plugin import load_plugin
from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.launch import launch_here
from bigtrain.jobs.placer_kinds import PLACERS, kind_of
from bigtrain.jobs.placing import Placer

PLUGIN = Path(__file__).with_name("ssh_placer.py")
JOBS = Path(sys.modules["bigtrain.jobs"].__file__ or "").parent
SSH = """#!{python}
# A stand-in for ssh, which this machine may not have: it runs the command here, and writes down where it was to run.
import os, sys
host, command = sys.argv[1:]
with open({asked!r}, "a") as asked:
    asked.write(f"{{host}} {{command}}\\n")
os.execvp("sh", ["sh", "-c", command])
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each command that was run on a host."""
    asked = tmp_path / "asked"
    command = tmp_path / "bin" / "ssh"
    command.parent.mkdir()
    command.write_text(SSH.format(python=sys.executable, asked=str(asked)))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SSH_HOSTS", "left right spare")
    return asked


def test_each_kind_is_found_by_its_name_and_says_what_a_placer_must() -> None:
    assert {"local", "ray", "slurm"} <= set(PLACERS)
    for name in PLACERS:
        kind = PLACERS[name]
        assert issubclass(kind, Placer)
        for method in ("of", "procs", "place", "release"):
            assert getattr(kind, method) is not getattr(Placer, method), (name, method)


def test_a_job_is_placed_where_its_command_runs_unless_it_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert kind_of(JobConfig()).name == "local"
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert kind_of(JobConfig()).name == "slurm"
    assert kind_of(JobConfig(placer="local")).name == "local"
    with pytest.raises(UserError, match="Unknown placer 'slrum'") as refused:
        kind_of(JobConfig(placer="slrum"))
    assert "slurm" in str(refused.value)


def test_launch_names_no_placer() -> None:
    """The launch file and the controller know the extension point alone."""
    for name in ("launch.py", "controller.py", "membership.py", "generation.py"):
        text = (JOBS / name).read_text().lower()
        assert "slurm" not in text.replace("bigtrain.jobs.placers.local", "")
        assert "isinstance(placer" not in text


def test_a_plugins_placer_runs_a_job_on_its_hosts(job: Any, ssh: Path) -> None:
    load_plugin(str(PLUGIN))
    job.write_rank("train(5)\nprint('node', os.environ['GROUP_RANK'], 'of', os.environ['WORLD_SIZE'])")
    code = launch_here(
        job.path, nproc=1, job=JobConfig(nodes=2, placer="ssh"), event=job.record, rank_module="tiny_rank",
        environment=job.environment(), say=job.said.append,
    )  # fmt: skip
    assert code == 0, job.said
    assert sorted(line.split()[0] for line in ssh.read_text().splitlines()) == ["left", "right"]
    assert "BIGTRAIN_JOB_TOKEN" not in ssh.read_text()
    assert "node 1 of 2" in job.log(0, 1)
    with pytest.raises(UserError, match="SSH_HOSTS names 3"):
        kind_of(JobConfig(placer="ssh")).procs(JobConfig(nodes=4))


@pytest.mark.slow
def test_a_run_is_trained_by_a_plugins_placer(ssh: Path, write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(name="by-ssh", duration="4 steps", job={"nodes": 2, "placer": "ssh"})
    done = subprocess.run(
        [sys.executable, "-m", "bigtrain", "train", str(config), "--plugin", str(PLUGIN), "--runs-dir", str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(ssh.read_text().splitlines()) == 2
    events = [json.loads(line) for line in (tmp_path / "by-ssh" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "finished"
