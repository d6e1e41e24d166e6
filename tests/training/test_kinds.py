"""Images with captions, arrays, and a kind of a plugin's own, through the same commands as text."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.storage import read_lines

ROOT = Path(__file__).parents[2]
SAME_LOSS = 1e-5
"""Relative, in FP32: sums over ranks round otherwise, and Adam carries the difference on."""
SAMPLES = 90
COLOURS = ("red", "green", "blue", "dark")


def write_captions(folder: Path) -> list[Any]:
    """Images of one colour with noise, and its name."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(SAMPLES):
        colour = number % len(COLOURS)
        pixels = rng.integers(0, 90, (12, 12, 3))
        if colour < 3:
            pixels[:, :, colour] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(COLOURS[colour])
    return [folder, "--captions", "--tokenizer", "bytes", "--image-size", "8"]


def write_arrays(folder: Path) -> list[Any]:
    """Series and their mean and last value."""
    x = np.random.default_rng(0).normal(size=(SAMPLES, 6, 1)).astype(np.float32)
    folder.mkdir()
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", np.concatenate([4 * x.mean(axis=1), x[:, -1]], axis=1))
    return [folder / "x.npy", folder / "y.npy", "--arrays"]


def write_sounds(folder: Path) -> list[Any]:
    """Tones of three heights with noise, a folder each."""
    rng = np.random.default_rng(0)
    for number in range(SAMPLES):
        tone = number % 3
        path = folder / f"tone{tone}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.sin(np.arange(40) * (tone + 1) / 3) + rng.normal(size=40) / 10
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes((8000 * values).astype("<i2").tobytes())
    return [folder, "--kind", "sounds", "--plugin", SOUNDS]


SOUNDS = ROOT / "configs" / "plugin" / "sounds.py"

KINDS: dict[str, tuple[Any, str, dict[str, int], list[str]]] = {
    "captions": (
        write_captions,
        "captioner-emoji.yaml",
        {"image_size": 8, "patch": 4, "layers": 2, "width": 32, "heads": 4, "context": 6},
        [],
    ),
    "arrays": (
        write_arrays,
        "plugin/series_run.yaml",
        {"length": 6, "features": 1, "targets": 2, "width": 32},
        ["--plugin", str(ROOT / "configs" / "plugin" / "series_model.py")],
    ),
    "sounds": (write_sounds, "plugin/sounds_run.yaml", {"frames": 40}, ["--plugin", str(SOUNDS)]),
}


def kinds(at_each_change: str) -> list[Any]:
    """One kind for CI; the others by hand."""
    return [name if name == at_each_change else pytest.param(name, marks=pytest.mark.exhaustive) for name in KINDS]


@pytest.fixture
def prepared(request: pytest.FixtureRequest, tmp_path: Path, bigtrain: Callable) -> tuple[Path, list[str]]:
    """The config that ships, made small, with its packed data; and the options of its model."""
    write, file, sizes, options = KINDS[request.param]
    packed = bigtrain("data", "pack", *write(tmp_path / "raw"), "--validation", "10%", "--out", tmp_path / "shards")
    assert packed.returncode == 0, packed.stderr
    config = yaml.safe_load((ROOT / "configs" / file).read_text())
    config["model"] |= sizes
    config |= {
        "data": {"train": str(tmp_path / "shards" / "train"), "validation": str(tmp_path / "shards" / "validation")},
        "batch": {"size": 11},
        "duration": "12 steps",
        "precision": "fp32",
        "optimizer": {"name": "adamw", "lr": 1e-2, "eps": 1e-6},
        "schedule": {"name": "constant"},
        "evaluation": {"every": "2 steps", "batches": 2},
        "checkpoint": {"every": "4 steps"},
        "layout": {"micro_size": 4},
        "streaming": {"log_samples": True},
        "tracking": {"wandb": "disabled"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, options


def losses(run: Path) -> dict[str, list[float]]:
    rows = list(read_lines(run / "metrics.jsonl"))
    return {key: [row[key] for row in rows if key in row] for key in ("loss", "val_loss")}


@pytest.mark.slow
@pytest.mark.parametrize("prepared", kinds("captions"), indirect=True)
def test_it_learns_in_several_processes_as_in_one(
    bigtrain: Callable, prepared: tuple[Path, list[str]], tmp_path: Path
) -> None:
    config, options = prepared
    found = []
    for nproc in (1, 2, 4):
        # A batch that the ranks do not divide, in passes that do not divide their share.
        result = bigtrain("train", config, *options, "--nproc", nproc, "--name", f"on-{nproc}")
        assert result.returncode == 0, result.stderr
        found.append(losses(tmp_path / "runs" / f"on-{nproc}"))
    for other in found:
        for key, values in other.items():
            assert values == pytest.approx(found[0][key], rel=SAME_LOSS)
    # An evaluation in every second step; what the captioner writes is shown after each.
    shown = 6 if "callbacks" in yaml.safe_load(config.read_text()) else 0
    runs = (tmp_path / "runs" / f"on-{nproc}" for nproc in (1, 2, 4))
    assert [len(list(run.glob("pictures/*-captions.png"))) for run in runs] == [shown] * 3
    # Of the same held-out samples: the losses of so few in a batch differ by more than a few steps teach.
    assert found[0]["val_loss"][-1] < 0.9 * found[0]["val_loss"][0]


@pytest.mark.slow
@pytest.mark.parametrize("prepared", kinds("sounds"), indirect=True)
def test_a_run_that_was_stopped_and_goes_on_is_the_run_that_was_not(
    bigtrain: Callable, prepared: tuple[Path, list[str]], tmp_path: Path
) -> None:
    config, options = prepared
    for name, durations in (("whole", [8]), ("in-two", [5, 8])):
        for steps in durations:
            arguments = ("--nproc", 2, "--name", name, f"duration={steps} steps")
            result = bigtrain("train", config, *arguments, *options)
            assert result.returncode == 0, result.stderr
    whole, in_two = (tmp_path / "runs" / name for name in ("whole", "in-two"))
    assert losses(in_two)["loss"] == losses(whole)["loss"]
    assert list(read_lines(in_two / "samples.jsonl")) == list(read_lines(whole / "samples.jsonl"))
    state, expected = (read_tensors(run / "checkpoints", 8, prefix="") for run in (in_two, whole))
    assert state.keys() == expected.keys()
    assert not [name for name in state if not torch.equal(state[name], expected[name])]


@pytest.mark.slow
@pytest.mark.parametrize("prepared", ["captions"], indirect=True)
def test_a_trained_captioner_names_what_it_sees(
    bigtrain: Callable, prepared: tuple[Path, list[str]], tmp_path: Path
) -> None:
    config, _ = prepared
    result = bigtrain("train", config, "duration=80 steps", "--name", "named", "checkpoint.every=80 steps")
    assert result.returncode == 0, result.stderr
    for number, colour in enumerate(COLOURS):
        # Of 12 x 12 pixels, scaled to what the model takes.
        sampled = bigtrain(
            "sample", "named", "--image", tmp_path / "raw" / f"{number}.png", "--temperature", 0, "--json"
        )
        assert sampled.returncode == 0, sampled.stderr
        assert json.loads(sampled.stdout)["text"] == colour
    refused = bigtrain("sample", "named", "--prompt", "red")
    assert (refused.returncode, "--image" in refused.stderr) == (2, True)


@pytest.mark.parametrize("prepared", ["arrays"], indirect=True)
def test_arrays_that_the_model_does_not_take_are_refused_before_anything_starts(
    bigtrain_here: Callable, prepared: tuple[Path, list[str]]
) -> None:
    config, options = prepared
    result = bigtrain_here("train", config, *options, "model.features=3")
    assert result.returncode == 2
    assert "'x' is 6 x 1, but the model takes 6 x 3" in result.stderr
