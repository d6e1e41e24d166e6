"""The `job` section, and what the package costs to import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from bigtrain.config import UserError
from bigtrain.heartbeat import PHASES
from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.devices import visible_gpus
from bigtrain.jobs.placer_kinds import kind_of
from tests.calls import calls_of

ROOT = Path(__file__).resolve().parents[2]


def test_limits_are_seconds_or_texts_with_a_unit() -> None:
    job = JobConfig.model_validate({"limits": {"start": "15 min", "step": 2.5, "save": "90 s"}})
    assert (job.limits.start, job.limits.step, job.limits.save, job.limits.evaluation) == (900, 2.5, 90, 600)
    assert JobConfig.model_validate(job.plain()) == job


@pytest.mark.parametrize(
    "section",
    [
        {"limits": {"step": "5 steps"}},
        {"limits": {"step": 0}},
        {"limits": {"steps": 5}},
        {"nodes": 0},
        {"nodes": 2, "min_nodes": 3},
        {"procs_per_node": 0},
        {"procs_per_node": "all"},
        {"max_failures": -1},
    ],
)
def test_what_makes_no_sense_is_refused(section: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        JobConfig.model_validate(section)


def test_every_phase_has_a_limit() -> None:
    assert set(JobConfig().limits.by_phase()) == set(PHASES)


def test_several_nodes_are_refused_on_one_machine() -> None:
    with pytest.raises(UserError, match=r"job.nodes is 2") as refused:
        kind_of(JobConfig(nodes=2)).procs(JobConfig(nodes=2))
    assert refused.value.fix


def test_auto_is_one_process_a_visible_gpu_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_of(JobConfig(procs_per_node=5)).procs(JobConfig(procs_per_node=5)) == 5
    assert kind_of(JobConfig()).procs(JobConfig()) == max(1, visible_gpus())
    monkeypatch.setattr(os, "listdir", lambda path: ["nvidia0", "nvidia1", "nvidia2", "nvidiactl", "null"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert kind_of(JobConfig()).procs(JobConfig()) == 3
    for listed, count in (("2,0", 2), ("", 1), ("-1", 1), ("1,-1,0", 1), ("0,3,1", 1), ("GPU-8932f937", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert kind_of(JobConfig()).procs(JobConfig()) == count


@pytest.mark.parametrize("module", ["bigtrain.heartbeat", "bigtrain.jobs.agent", "bigtrain.jobs.launch"])
def test_launching_imports_neither_torch_nor_pydantic_and_little_else(module: str, tmp_path: Path) -> None:
    script = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "ray", "pydantic", "numpy", "wandb"} & set(output.split())
    scripts = {name: tmp_path / f"only_{name}.py" for name in (module, "asyncio")}
    for name, path in scripts.items():
        path.write_text(f"import {name}")
    assert calls_of(scripts[module]) < 1.2 * calls_of(scripts["asyncio"])
