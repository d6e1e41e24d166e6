"""One run that moves between engines and layouts, through the command itself."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bigtrain.storage import read_lines

RELATIVE = 1e-5

# Ranks and layout of each four steps.
Segments = list[tuple[int, tuple[str, ...]]]
FEW: Segments = [
    (2, ("layout.tp=2",)),
    (2, ("engine.name=deepspeed", "engine.zero=3")),
    (4, ("engine.name=deepspeed", "engine.zero=1", "layout.tp=2", "layout.pp=2")),
]
ALL: Segments = [
    *FEW[:2],
    (1, ()),
    (2, ("engine.name=deepspeed", "engine.zero=1", "engine.offload=optimizer")),
    (4, ("layout.tp=2", "layout.sequence_parallel=false")),
    FEW[2],
]
SHARED_SEQUENCES: Segments = [
    (2, ("layout.cp=2",)),
    (2, ("layout.cp=2", "layout.cp_kind=all_gather")),
    (1, ()),
]
SECTIONS = {"optimizer": {"lr": 1e-3, "eps": 1e-6}, "batch": {"size": 6}, "checkpoint": {"every": "2 steps"}}


def losses(run: Path) -> list[float]:
    return column(run, "loss")


def column(run: Path, name: str) -> list[float]:
    return [row[name] for row in read_lines(run / "metrics.jsonl")]


def held_out(run: Path) -> list[float]:
    return [row["val_loss"] for row in read_lines(run / "metrics.jsonl") if "val_loss" in row]


@pytest.mark.parametrize(
    "segments",
    [
        pytest.param(FEW, id="few", marks=pytest.mark.slow),
        pytest.param(ALL, id="all", marks=pytest.mark.exhaustive),
        pytest.param(SHARED_SEQUENCES, id="shared sequences", marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_that_changes_engine_and_layout_is_the_run_of_one_process(
    bigtrain: Callable, write_config: Callable, tmp_path: Path, segments: Segments
) -> None:
    for number, (nproc, how) in enumerate(segments, start=1):
        result = bigtrain("train", write_config(duration=f"{4 * number} steps", **SECTIONS), *how, "--nproc", nproc)
        assert result.returncode == 0, result.stderr
    config = write_config(duration=f"{4 * len(segments)} steps", **SECTIONS)
    assert bigtrain("train", config, "--name", "alone").returncode == 0
    moved, alone = losses(tmp_path / "runs" / "tiny"), losses(tmp_path / "runs" / "alone")
    assert len(alone) == 4 * len(segments)
    assert moved == pytest.approx(alone, rel=RELATIVE)
    assert column(tmp_path / "runs" / "tiny", "tokens") == column(tmp_path / "runs" / "alone", "tokens")


MOVES: list[tuple[int, tuple[str, ...]]] = [
    (2, ("engine.name=deepspeed", "engine.zero=3")),
    (4, ("layout.tp=2", "layout.pp=2")),
    (2, ("engine.name=deepspeed", "engine.zero=1", "layout.pp=2")),
]
SEED = 20


@pytest.mark.exhaustive
def test_a_run_killed_while_it_moves_is_the_run_of_one_process(
    bigtrain: Callable, write_config: Callable, tmp_path: Path
) -> None:
    """Each move is killed once, with its launcher: while ranks start, while they load, or after some steps."""
    config = write_config(duration="4 steps", **SECTIONS)
    assert bigtrain("train", config, *MOVES[-1][1], "--nproc", MOVES[-1][0]).returncode == 0
    config, moments = write_config(duration="40 steps", **SECTIONS), random.Random(SEED)
    for nproc, how in MOVES:
        command = [sys.executable, "-m", "bigtrain.cli", "train", str(config), *how, "--nproc", str(nproc)]
        launcher = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(2.0, 9.0))
        launcher.kill()
        launcher.wait()
        last = bigtrain("status", "tiny", "--json")
        print(f"seed {SEED}: {how} killed at step {json.loads(last.stdout)['step']}")
    result = bigtrain("train", config, "layout.tp=2", "--nproc", 2)
    assert result.returncode == 0, result.stderr
    assert bigtrain("train", config, "--name", "alone").returncode == 0
    moved, alone = tmp_path / "runs" / "tiny", tmp_path / "runs" / "alone"
    assert column(moved, "step") == list(range(1, 41))
    assert losses(moved) == pytest.approx(losses(alone), rel=RELATIVE)
    assert list(read_lines(moved / "samples.jsonl")) == list(read_lines(alone / "samples.jsonl"))


STAGES: list[tuple[str, int, tuple[str, ...]]] = [
    ("4 steps", 2, ("layout.pp=2", "layout.micro_size=1")),
    ("8 steps", 1, ()),
    ("12 steps", 4, ("layout.pp=2", "layout.tp=2")),
    ("16 steps", 4, ("layout.pp=2", "layout.pp_schedule=zero_bubble")),
]


@pytest.mark.exhaustive
def test_a_run_in_stages_moves_and_shows_the_losses_of_one_process(
    bigtrain: Callable, write_config: Callable, tmp_path: Path
) -> None:
    """Its first rank, which logs, is not the one that computes the loss."""
    for duration, nproc, how in STAGES:
        result = bigtrain("train", write_config(duration=duration, **SECTIONS), *how, "--nproc", nproc)
        assert result.returncode == 0, result.stderr
        status = json.loads(bigtrain("status", "tiny", "--json").stdout)
        assert status["loss"] == losses(tmp_path / "runs" / "tiny")[-1]
    config = write_config(duration=STAGES[-1][0], **SECTIONS)
    assert bigtrain("train", config, "--name", "alone").returncode == 0
    moved, alone = tmp_path / "runs" / "tiny", tmp_path / "runs" / "alone"
    assert losses(moved) == pytest.approx(losses(alone), rel=RELATIVE)
    assert held_out(moved) == pytest.approx(held_out(alone), rel=RELATIVE)
    assert len(held_out(moved)) == len(STAGES)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (("layout.tp=3",), "tp 3 does not divide model.heads 4 and model.kv_heads 2"),
        (("layout.dp_replicate=2", "engine.name=deepspeed"), "only over layout.dp_shard or layout.pp or layout.tp"),
        (("engine.name=accelerate",), "does not run on the engine 'accelerate'"),
        (("layout.cp=3",), "cannot divide 4 query and 2 key heads; cp may be 1, 2, 4, or"),
        (("layout.cp=2", "engine.name=deepspeed"), "only over layout.dp_shard or layout.pp or layout.tp"),
        (("layout.pp=4",), "makes 4 stages of 2 blocks; with 1 for each rank, pp may be 1, 2"),
        (("layout.pp=2", "engine.name=deepspeed"), "DeepSpeed's pipeline supports ZeRO 0 and 1, not 2"),
        (("layout.pp=2", "engine.name=deepspeed", "engine.zero=1", "engine.offload=optimizer"), "optimizer on the CPU"),
        (("engine.name=deepspeed", "engine.passthrough.zero_optimization.reduce_buket_size=5"), "reduce_buket_size"),
        (("layout.pp=2", "layout.pp_schedule=zero_bubble", "engine.recompute=full"), "Set engine.recompute to none"),
    ],
)
def test_what_cannot_work_is_refused_before_any_process_starts(
    bigtrain_here: Callable, write_config: Callable, tmp_path: Path, how: tuple[str, ...], said: str
) -> None:
    result = bigtrain_here("train", write_config(), *how, "--nproc", 2)
    assert result.returncode == 2
    assert said in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "strategies",
    [
        pytest.param(("zero2", "fsdp2"), marks=pytest.mark.slow),
        pytest.param(("ddp", "zero2", "fsdp2"), marks=pytest.mark.exhaustive),
    ],
    ids="-".join,
)
def test_a_model_of_transformers_trains_resumes_and_moves_through_the_command(
    bigtrain: Callable, write_config: Callable, tmp_path: Path, strategies: tuple[str, ...]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    set_seed(0)
    shape = GPT2Config(vocab_size=257, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt2")
    sections = {**SECTIONS, "model": {"arch": "hf", "hf": str(tmp_path / "gpt2"), "context": 32}}
    for number, strategy in enumerate(strategies, start=1):
        engine = {"name": "accelerate", "strategy": strategy}
        config = write_config(duration=f"{4 * number} steps", engine=engine, **sections)
        result = bigtrain("train", config, "--nproc", 2)
        assert result.returncode == 0, result.stderr
    alone = bigtrain("train", config, "--name", "alone", "--nproc", 1)
    assert alone.returncode == 0, alone.stderr
    moved = losses(tmp_path / "runs" / "tiny")
    assert len(moved) == 4 * len(strategies)
    assert moved == pytest.approx(losses(tmp_path / "runs" / "alone"), rel=RELATIVE)
    assert bigtrain("config", "validate", config).returncode == 0
    sampled = bigtrain("sample", "tiny", "--prompt", "ab", "--tokens", 4, "--temperature", 0)
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.startswith("ab")


@pytest.mark.slow
def test_a_run_goes_to_deepspeed_and_back_through_the_command(
    bigtrain: Callable, write_config: Callable, tmp_path: Path
) -> None:
    assert bigtrain("train", write_config(duration="4 steps", **SECTIONS)).returncode == 0
    converted = bigtrain("checkpoint", "convert", "tiny", "--to", "deepspeed", "--out", "universal")
    assert converted.returncode == 0, converted.stderr
    refused = bigtrain("checkpoint", "import", "universal", "--out", "back")
    assert refused.returncode == 2
    assert "--trust-checkpoint" in refused.stderr
    assert bigtrain("checkpoint", "import", "universal", "--out", "back", "--trust-checkpoint").returncode == 0
    for name, source in (("from-run", "tiny"), ("from-import", str(tmp_path / "back"))):
        config = write_config(
            duration="2 steps", init={"source": f"{source}@4", "state": "weights+optimizer"}, **SECTIONS
        )
        result = bigtrain("train", config, "--name", name)
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "runs" / "from-import") == losses(tmp_path / "runs" / "from-run")
