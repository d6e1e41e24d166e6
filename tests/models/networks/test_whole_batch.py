"""What couples a batch is the same at every layout: values, gradients, running statistics; planted faults are seen."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from bigtrain.testing.ranks import RankPool

_spec = importlib.util.spec_from_file_location("networks_training", Path(__file__).with_name("training.py"))
assert _spec is not None
assert _spec.loader is not None
training: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(training)

AGREES = 1e-5
"""Relative above 1, in FP32."""

pytestmark = pytest.mark.slow


def away(a: Any, b: Any) -> float:
    (loss, found), (other_loss, other) = a, b
    assert found.keys() == other.keys()
    off = [abs(loss - other_loss) / max(1.0, abs(loss))]
    for name, x in found.items():
        apart = (x.double() - other[name].double()).abs().max()
        off.append(float(apart / x.double().abs().max().clamp(min=1)))
    return max(off)


@pytest.mark.parametrize("arch", ["resnet", "families.clip", "instance_norm"])
@pytest.mark.parametrize(("count", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_every_layout_gives_what_one_process_gives(ranks: RankPool, arch: str, count: int, replicas: int) -> None:
    alone = ranks.run(training.first_step, arch, ranks=1)[0]
    for found in ranks.run(training.first_step, arch, replicas, ranks=count):
        assert away(alone, found) <= AGREES


@pytest.mark.parametrize(
    ("arch", "fault"),
    [
        ("resnet", "statistics of one rank"),
        ("families.clip", "negatives of one rank"),
        ("families.clip", "gradient of what is gathered is lost"),
    ],
)
def test_a_planted_fault_is_seen(ranks: RankPool, arch: str, fault: str) -> None:
    alone = ranks.run(training.first_step, arch, ranks=1)[0]
    assert away(alone, ranks.run(training.first_step, arch, 1, fault, ranks=2)[0]) > 10 * AGREES


def test_statistics_that_are_not_saved_are_seen(ranks: RankPool) -> None:
    losses, _ = ranks.run(training.train, ["resnet"], ranks=1)[0]["resnet"]
    resumed, _ = ranks.run(training.train_with_fault, "resnet", "buffers are not saved", ranks=1)[0]
    assert resumed != losses
    assert ranks.run(training.train_with_fault, "resnet", "", ranks=1)[0][0] == losses
