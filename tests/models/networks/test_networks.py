"""Networks as their authors write them: plain torch's losses, the same at two ranks, resumed to the bit."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.config.plugin import ACTIVE
from bigtrain.models.config import FAMILIES
from bigtrain.testing.ranks import RankError, RankPool

_spec = importlib.util.spec_from_file_location("networks_training", Path(__file__).with_name("training.py"))
assert _spec is not None
assert _spec.loader is not None
training: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(training)

DRAWS = {"lenet", "convnext", "ddpm", "vae", "lstm", "tied", "noisy", "skipping"}
"""Whose draws in forward are keyed, so that plain torch, which draws otherwise, gives other losses."""
COUPLED = {"resnet", "clip"}
"""That need a rank's part of a batch in one pass."""
AGREES, LAYOUTS_AGREE = 1e-5, 1e-4
"""Relative above 1, in FP32: sums are taken in another order."""


def away(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / max(1.0, abs(x)) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module", autouse=True)
def registered_here_alone() -> Iterator[None]:
    """Other tests of this process do not find the networks' families."""
    found, active = dict(FAMILIES.found), list(ACTIVE)
    yield
    FAMILIES.found = found
    ACTIVE[:] = active


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> dict[str, Any]:
    return ranks.run(training.train, training.families(), ranks=1, timeout_s=300)[0]


def test_there_are_twenty_networks() -> None:
    assert len(training.families()) >= 20


def test_one_process_gives_the_losses_of_plain_torch(alone: dict[str, Any]) -> None:
    off = {arch: away(training.reference(arch), losses) for arch, (losses, _) in alone.items() if arch not in DRAWS}
    assert {arch: by for arch, by in off.items() if not by <= AGREES} == {}


def test_two_ranks_give_the_losses_of_one_process(ranks: RankPool, alone: dict[str, Any]) -> None:
    found = ranks.run(training.train, training.families(), ranks=2, timeout_s=300)
    assert _faults(alone, found[0]) == {}
    assert all(found[0][arch][0] == found[1][arch][0] for arch in alone)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_micro_batches_change_nothing(ranks: RankPool, alone: dict[str, Any], count: int) -> None:
    archs = [arch for arch in training.families() if arch not in COUPLED]
    found = ranks.run(training.train, archs, 2, ranks=count, timeout_s=300)
    assert _faults({arch: alone[arch] for arch in archs}, found[0]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_recompute_meets_the_draws_of_the_first_pass(ranks: RankPool, alone: dict[str, Any], count: int) -> None:
    archs = ["tied", "convnext", "fourier"]
    found = ranks.run(training.train, archs, None, None, {"recompute": "full"}, ranks=count, timeout_s=300)
    assert _faults({arch: alone[arch] for arch in archs}, found[0]) == {}


@pytest.mark.parametrize("arch", ["resnet", "clip"])
def test_what_couples_a_batch_is_refused_in_several_passes_with_a_size_that_works(ranks: RankPool, arch: str) -> None:
    with pytest.raises(RankError, match=r"one pass, and a step has 3 passes[\s\S]*micro_size to 6 or more"):
        ranks.run(training.train, [arch], 2, ranks=1)


@pytest.mark.slow
def test_resumed_they_are_the_undisturbed_run_to_the_bit(ranks: RankPool, alone: dict[str, Any]) -> None:
    resumed = ranks.run(training.train, training.families(), None, 2, ranks=1, timeout_s=300)[0]
    for arch, (losses, state) in alone.items():
        assert resumed[arch][0] == losses, arch
        assert all(torch.equal(value, resumed[arch][1][name]) for name, value in state.items()), arch


def _faults(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    faults = {}
    for arch, (losses, state) in expected.items():
        by = away(losses, found[arch][0])
        wrong = [
            name
            for name, value in state.items()
            if not torch.allclose(value.double(), found[arch][1][name].double(), rtol=1e-3, atol=2e-4)
        ]
        if not by <= LAYOUTS_AGREE or wrong:
            faults[arch] = by, wrong[:3]
    return faults
