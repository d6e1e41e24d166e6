"""A run on a mixture, through the real command: shares, losses by source, resume, refusal, a new phase by --fork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.run import ExitCode
from bigtrain.storage import read_lines

BATCH, STEPS, CHANGE = 8, 12, 5
DEADLINE_S = 200.0
MODULES = {"web": ("abc", "bisect", "colorsys"), "code": ("copy", "heapq", "queue", "sched")}
OF_LOSSES = 1e-5
"""Relative, in FP32, where the number of ranks changes."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """web/ and code/: modules of the standard library, as bytes."""
    out, library = tmp_path_factory.mktemp("sources"), Path(os.__file__).parent
    for name, modules in MODULES.items():
        files = [library / f"{module}.py" for module in modules]
        pack(files, out / name, Tokenizer.open("bytes"), validation="10%", shard_bytes=1 << 13)
    return out


@pytest.fixture
def configured(write_config: Callable[..., Path], tmp_path: Path, sources: Path) -> Callable[..., Path]:
    """Writes the config of a run that changes its mixture after CHANGE steps."""

    def write(name: str, web: str | None = None, **sections: Any) -> Path:
        train = [
            {"path": web or str(sources / "web" / "train"), "name": "web", "weight": 3},
            {"path": str(sources / "code" / "train"), "weight": 1},
            {"path": str(sources / "code" / "train"), "weight": 9, "from_step": CHANGE},
        ]
        validation = [{"path": str(sources / source / "validation")} for source in MODULES]
        path = write_config(
            name=name,
            data={"train": train, "validation": validation, "shuffle_window": 2},
            batch={"size": BATCH},
            duration=f"{STEPS} steps",
            checkpoint={"every": "3 steps"},
            optimizer={"lr": 1e-3, "eps": 1e-6},
            **{"streaming": {"log_samples": True, "cache_dir": str(tmp_path / "cache")}, **sections},
        )
        return path.rename(tmp_path / f"{name}.yaml")

    return write


def rows(run: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return list(read_lines(run / file))


def ids(run: Path) -> list[list[str]]:
    return [row["ids"] for row in rows(run, "samples.jsonl")]


def trained(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == ExitCode.FINISHED, result.stderr


def assert_same_numbers(run: Path, expected: Path) -> None:
    """Losses, of each source too, of the same steps."""
    for mine, other in zip(rows(run), rows(expected), strict=True):
        assert mine.keys() == other.keys()
        assert {"loss/web", "loss/code", "epochs/web"} <= mine.keys()
        for name in mine:
            if "loss" in name or "epochs" in name:
                assert mine[name] == pytest.approx(other[name], rel=OF_LOSSES), (name, mine["step"])


@pytest.mark.slow
def test_a_mixture_killed_and_resumed_on_two_ranks_consumes_the_same_and_another_one_is_refused(
    configured: Callable[..., Path], tmp_path: Path, bigtrain: Callable
) -> None:
    trained(bigtrain("train", configured("undisturbed")))
    expected = tmp_path / "runs" / "undisturbed"
    drawn = Counter(sample.split("/")[0] for step in ids(expected)[:CHANGE] for sample in step)
    assert abs(drawn["web"] - 0.75 * CHANGE * BATCH) < 1
    later = Counter(sample.split("/")[0] for step in ids(expected)[CHANGE:] for sample in step)
    assert abs(later["web"] - 0.25 * (STEPS - CHANGE) * BATCH) < 1

    config, run = configured("killed"), tmp_path / "runs" / "killed"
    command = [sys.executable, "-m", "bigtrain.cli", "train", str(config)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + DEADLINE_S
    while not list(run.glob("checkpoints/step_*/manifest.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    trained(bigtrain("train", config, "--nproc", 2))
    assert ids(run) == ids(expected)
    assert_same_numbers(run, expected)

    text = yaml.safe_load(config.read_text())
    text["data"]["train"][0]["weight"] = 1
    config.write_text(yaml.safe_dump(text))
    refused = bigtrain("train", config)
    assert refused.returncode == ExitCode.USER
    assert "data.train.from step 0.web: 0.75 -> 0.5" in refused.stderr


@pytest.mark.slow
def test_a_forked_mixture_is_a_new_phase_that_reads_nothing_again(
    configured: Callable[..., Path], tmp_path: Path, bigtrain: Callable, sources: Path
) -> None:
    """Another mixture and another batch from step 12 on: what was read before does not come again in its epoch."""
    config = configured("before", model={"arch": "gpt2", "layers": 1, "width": 16, "heads": 2, "context": 64})
    trained(bigtrain("train", config))
    text = yaml.safe_load(config.read_text())
    text["data"]["train"] = [{"path": str(sources / name / "train"), "weight": 1} for name in MODULES]
    text |= {"batch": {"size": 6}, "duration": f"{STEPS + 10} steps"}
    config.write_text(yaml.safe_dump(text))
    trained(bigtrain("train", config, "--fork", "after"))
    before, after = (tmp_path / "runs" / name for name in ("before", "after"))
    seen = [sample for step in ids(before) + ids(after) for sample in step]
    assert len(set(seen)) == len(seen) == STEPS * BATCH + 60
    shares = Counter(sample.split("/")[0] for step in ids(after) for sample in step)
    assert shares == {"web": 30, "code": 30}
    saved = yaml.safe_load((after / "config.yaml").read_text())["data"]["consumed"]
    drawn = Counter(sample.split("/")[0] for step in ids(before) for sample in step)
    assert (saved["step"], sorted(saved["drawn"].values())) == (STEPS, sorted(drawn.values()))
    # The branch, begun again from the user's own file, is the same run; its own branch keeps to what both consumed.
    again = bigtrain("train", after / "config.yaml")
    trained(again)
    assert "finished" in again.stderr
    text["name"] = "after"
    text["data"]["train"] = [{"path": str(sources / "web" / "train")}]
    text["duration"] = f"{STEPS + 12} steps"
    config.write_text(yaml.safe_dump(text))
    trained(bigtrain("train", config, "--fork", "web-alone"))
    last = [sample for step in ids(tmp_path / "runs" / "web-alone") for sample in step]
    assert len(last) == 12
    assert {sample.split("/")[0] for sample in last} == {"web"}
    assert not set(last) & set(seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ("layout.tp=2",),
        pytest.param(("layout.pp=2",), marks=pytest.mark.exhaustive),
        pytest.param(("engine.name=deepspeed",), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_the_losses_by_source_are_those_of_one_process(
    configured: Callable[..., Path], tmp_path: Path, bigtrain: Callable, how: tuple[str, ...]
) -> None:
    config = configured("alone")
    trained(bigtrain("train", config, "duration=6 steps"))
    trained(bigtrain("train", config, "duration=6 steps", *how, "layout.micro_size=3", "--nproc", 2, "--name", "how"))
    assert ids(tmp_path / "runs" / "how") == ids(tmp_path / "runs" / "alone")
    assert_same_numbers(tmp_path / "runs" / "how", tmp_path / "runs" / "alone")
