"""A second kind of data: an image classifier from a tar of images through the same commands as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.digits import mnist_digits, write_tar

ROOT = Path(__file__).parents[2]
IMAGES, HELD_OUT = 320, 64
SIDE = 28
SAME_LOSS = 1e-5
"""Relative, in FP32: sums over ranks round otherwise, and Adam carries the difference on."""


def drawn_digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten classes that differ in where a bright square lies, with noise: uint8 (count, SIDE, SIDE), labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, count)
    images = rng.integers(0, 120, (count, SIDE, SIDE))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[9 * row : 9 * row + 8, 7 * column : 7 * column + 7] += 130
    return images.astype(np.uint8), labels


@pytest.fixture
def digits(request: pytest.FixtureRequest, tmp_path: Path, bigtrain: Callable) -> Path:
    """shards/mnist/train and validation, indexed."""
    count = IMAGES + HELD_OUT
    if request.param == "mnist":
        images, labels = mnist_digits(request.getfixturevalue("real_data") / "mnist", count=count)
    else:
        images, labels = drawn_digits(count)
    shards = tmp_path / "shards" / "mnist"
    half = IMAGES // 2
    write_tar(shards / "train" / "digits-0.tar", images[:half], labels[:half])
    write_tar(shards / "validation" / "digits.tar", images[IMAGES:], labels[IMAGES:])
    # A second shard of the training data.
    write_tar(shards / "more" / "digits-1.tar", images[half:IMAGES], labels[half:IMAGES])
    (shards / "more" / "digits-1.tar").rename(shards / "train" / "digits-1.tar")
    for split in ("train", "validation"):
        result = bigtrain("data", "index", shards / split)
        assert result.returncode == 0, result.stderr
    return shards


def train(bigtrain: Callable, config: Path, nproc: int, name: str) -> list[dict]:
    """A run's metrics by step."""
    result = bigtrain("train", config, "--nproc", nproc, "--name", name)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in (config.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()]


# Two alone show that it learns; both, that they learn the same as well.
@pytest.mark.parametrize(
    ("digits", "nprocs"),
    [
        pytest.param("synthetic", (2,), id="synthetic-two", marks=pytest.mark.exhaustive),
        pytest.param("synthetic", (1, 2), id="synthetic-one and two", marks=pytest.mark.exhaustive),
        pytest.param("mnist", (1, 2), id="mnist-one and two", marks=pytest.mark.slow),
    ],
    indirect=["digits"],
)
def test_an_image_classifier_learns_in_two_processes_as_in_one(
    bigtrain: Callable, digits: Path, tmp_path: Path, nprocs: tuple[int, ...]
) -> None:
    # The config that ships, shortened; a batch of 21 that two ranks do not divide, in passes of at most 6.
    config = yaml.safe_load((ROOT / "configs" / "vit-mnist.yaml").read_text())
    config["model"]["layers"] = 2
    augment = config["data"].pop("augment")
    config |= {
        "batch": {"size": 21},
        "duration": "60 steps",
        "precision": "fp32",
        "optimizer": {"name": "adamw", "lr": 1e-3, "eps": 1e-6},
        "schedule": {"name": "constant", "warmup": "10 steps"},
        "evaluation": {"every": "20 steps", "batches": 4},
        "layout": {"micro_size": 6},
        "tracking": {"wandb": "disabled"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    rows = {nproc: train(bigtrain, path, nproc, f"on-{nproc}") for nproc in nprocs}
    for key in ("loss", "val_loss"):
        found = [[row[key] for row in rows[nproc] if key in row] for nproc in nprocs]
        assert all(other == pytest.approx(found[0], rel=SAME_LOSS) for other in found)
        assert found[0][-1] < 0.85 * found[0][0], f"{key} does not fall: {found[0]}"
    assert [row["tokens"] for row in rows[2]] == [21 * row["step"] for row in rows[2]]
    first, last = (np.mean([row["loss"] for row in part]) for part in (rows[2][:5], rows[2][-5:]))
    print(f"loss {first:.3f} -> {last:.3f}, held out {[row['val_loss'] for row in rows[2] if 'val_loss' in row]}")
    assert last < 0.6 * first
    if len(nprocs) > 1:
        path.write_text(
            yaml.safe_dump(config | {"data": config["data"] | {"augment": augment}, "duration": "10 steps"})
        )
        one, several = (train(bigtrain, path, nproc, f"augmented-on-{nproc}") for nproc in nprocs)
        assert [row["loss"] for row in several] == pytest.approx([row["loss"] for row in one], rel=SAME_LOSS)
        assert one[0]["loss"] != pytest.approx(rows[nprocs[0]][0]["loss"], rel=SAME_LOSS)
