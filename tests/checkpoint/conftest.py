"""Shared by the checkpoint tests: small states, saved for real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.saver import Saver

SAVE_FACTS = {"config_hash": "config", "identity": "identity"}


@pytest.fixture
def state_at() -> Callable[[int], dict[str, Tensor]]:
    """The state "after" a step: values that follow from the step, of several shapes and dtypes."""

    def make(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        return {
            "model.weight": torch.randn(33, 17, generator=generator),
            "model.bias": torch.randn(33, generator=generator).to(torch.bfloat16),
            "model.count": torch.tensor(step),
            "model.nothing": torch.empty(0, 4),
            "optimizer.weight.exp_avg": torch.randn(33, 17, generator=generator),
            "optimizer.weight.step": torch.tensor(float(step)),
        }

    return make


@pytest.fixture
def saved(tmp_path: Path, state_at: Callable[[int], dict[str, Tensor]]) -> Callable[..., Path]:
    """Save the states of some steps; returns the directory of the checkpoints."""

    def save(*steps: int, keep_last: int = 10) -> Path:
        directory = tmp_path / "checkpoints"
        saver = Saver(directory, CheckpointConfig(keep_last=keep_last, asynchronous=False))
        for step in steps:
            saver.save(step, state_at(step), progress={"step": step}, **SAVE_FACTS)
            assert saver.last is not None
            assert saver.last.status == "saved"
        saver.close()
        return directory

    return save


@pytest.fixture
def run_script() -> Callable[..., str]:
    """Run a script of this folder, one process a rank, and return what rank 0 printed."""
    root = Path(__file__).parents[2]

    def run(name: str, *arguments: object, ranks: int = 1, expected: dict[int, int] | None = None) -> str:
        script = str(Path(__file__).with_name(name))
        processes = []
        for rank in range(ranks):
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(root),
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
            }
            command = [sys.executable, script, *map(str, arguments)]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        try:
            outputs = [process.communicate(timeout=150)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            assert process.returncode == (expected or {}).get(rank, 0), f"rank {rank}:\n{outputs[rank]}"
        return outputs[0]

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", place], check=True)
