"""Networks as their authors write them: plain torch's losses, the same at two ranks, resumed to the bit."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config import UserError
from bigtrain.config.plugin import ACTIVE
from bigtrain.models.config import FAMILIES, DataKind
from bigtrain.models.plain import Batch, PlainConfig, gather_batch, pixels
from bigtrain.testing.ranks import RankError, RankPool

_spec = importlib.util.spec_from_file_location("networks_training", Path(__file__).with_name("training.py"))
assert _spec is not None
assert _spec.loader is not None
training: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(training)

DRAWS = {
    "lenet", "convnext", "ddpm", "vae", "lstm", "tied", "noisy", "skipping", "checkpointed", "seq2seq", "tagger",
    "families.bert", "families.vae", "families.rnn", "families.lenet", "families.sam", "families.dalle",
}  # fmt: skip
"""Whose draws in forward are keyed, so that plain torch, which draws otherwise, gives other losses."""
MOVED_TWICE = {"densenet"}
"""Whose running statistics plain torch moves again where torch.utils.checkpoint computes them again."""
BY_SLOW_TESTS = {
    "seq2seq", "tagger", "capsules", "fixed_graph", "vqvae", "lstm", "vae", "lenet", "sync_norm", "equilibrium",
    "revnet", "ctc",
}  # fmt: skip
"""Which the fast tests do not train; some of them are much like bigtrain's own."""
COUPLED = {
    "resnet", "clip", "densenet", "instance_norm", "graph", "vqvae", "families.clip", "families.resnet", "clipped",
    "sync_norm",
}  # fmt: skip
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
    archs = [arch for arch in training.families() if arch not in BY_SLOW_TESTS]
    return ranks.run(training.train, archs, ranks=1, timeout_s=300)[0]


@pytest.fixture(scope="module")
def everything(ranks: RankPool, alone: dict[str, Any]) -> dict[str, Any]:
    return alone | ranks.run(training.train, sorted(BY_SLOW_TESTS), ranks=1, timeout_s=300)[0]


def test_there_are_twenty_networks() -> None:
    assert len(training.families()) >= 20


def test_one_process_gives_the_losses_of_plain_torch(alone: dict[str, Any]) -> None:
    assert _away_from_plain_torch(alone) == {}


def test_two_ranks_give_the_losses_of_one_process(ranks: RankPool, alone: dict[str, Any]) -> None:
    _check_two_ranks(ranks, alone)


@pytest.mark.slow
def test_the_others_give_the_losses_of_plain_torch_and_of_one_process(
    ranks: RankPool, everything: dict[str, Any]
) -> None:
    others = {arch: everything[arch] for arch in BY_SLOW_TESTS}
    assert _away_from_plain_torch(others) == {}
    _check_two_ranks(ranks, others)


@pytest.mark.slow
def test_four_ranks_give_the_losses_of_one_process_for_bigtrains_own(ranks: RankPool, alone: dict[str, Any]) -> None:
    found = ranks.run(training.train, sorted(training.OWN), ranks=4, timeout_s=300)[0]
    for arch in training.OWN:
        assert away(alone[arch][0], found[arch][0]) <= AGREES, arch


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_micro_batches_change_nothing(ranks: RankPool, everything: dict[str, Any], count: int) -> None:
    archs = [arch for arch in training.families() if arch not in COUPLED]
    found = ranks.run(training.train, archs, 2, ranks=count, timeout_s=300)
    assert _faults({arch: everything[arch] for arch in archs}, found[0]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_recompute_meets_the_draws_of_the_first_pass(ranks: RankPool, alone: dict[str, Any], count: int) -> None:
    archs = ["tied", "convnext", "fourier", "resnet"]
    found = ranks.run(training.train, archs, None, None, {"recompute": "full"}, ranks=count, timeout_s=300)
    assert _faults({arch: alone[arch] for arch in archs}, found[0]) == {}


@pytest.mark.parametrize("arch", ["resnet", "clip", "clipped"])
def test_what_couples_a_batch_is_refused_in_several_passes_with_a_size_that_works(ranks: RankPool, arch: str) -> None:
    with pytest.raises(RankError, match=r"one pass, but a step has 3 passes[\s\S]*micro_size to 6 or more"):
        ranks.run(training.train, [arch], 2, ranks=1)


@pytest.mark.slow
def test_resumed_they_are_the_undisturbed_run_to_the_bit(ranks: RankPool, everything: dict[str, Any]) -> None:
    resumed = ranks.run(training.train, training.families(), None, 2, ranks=1, timeout_s=300)[0]
    for arch, (losses, state) in everything.items():
        assert resumed[arch][0] == losses, arch
        assert all(torch.equal(value, resumed[arch][1][name]) for name, value in state.items()), arch


@pytest.mark.parametrize("arch", ["counting", "random_features"])
def test_a_loaded_module_has_extra_state_and_the_tables_of_init(ranks: RankPool, arch: str) -> None:
    trained, loaded = ranks.run(training.loss_of_a_loaded_copy, arch, ranks=1)[0]
    assert abs(trained - loaded) <= AGREES


class Linear(PlainConfig):
    """What the refused ones share."""

    data_kind: ClassVar[DataKind] = "images"
    arch: Literal["linear"] = "linear"

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (4, 4, 1)

    def build(self, vocab_size: int) -> nn.Module:
        return nn.Linear(16, 3)

    def inputs(self, batch: Batch) -> Tensor:
        return pixels(batch).flatten(1)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch["labels"], reduction="none")


class Mixup(Linear):
    """Samples of a batch mixed by NumPy (Zhang et al. 2018); some draws hide it."""

    def inputs(self, batch: Batch) -> Tensor:
        x = super().inputs(batch)
        share, order = np.random.beta(0.4, 0.4), torch.randperm(len(x))
        return share * x + (1 - share) * x[order]


class HostNoise(Linear):
    """Noise of each sequence by NumPy."""

    def inputs(self, batch: Batch) -> Tensor:
        x = super().inputs(batch)
        return x + torch.from_numpy(np.random.normal(size=tuple(x.shape))).to(x)


class TwoViews(Linear):
    """Both views of a batch gathered as one."""

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        everything, _ = gather_batch(torch.cat([output, -output]))
        return (output @ everything.T).logsumexp(1)


class Sparse(Linear):
    """A sparse buffer that is to be saved."""

    def build(self, vocab_size: int) -> nn.Module:
        module = nn.Linear(16, 3)
        module.register_buffer("graph", torch.eye(2).to_sparse())
        return module


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Mixup, "not the sum of the losses of its parts"),
        (HostNoise, r"(?s)draws random values from NumPy or random, which .*Draw random values with torch"),
        (TwoViews, r"\d+ rows for the \d+ sequences"),
        (Sparse, "sparse tensor"),
    ],
)
def test_what_would_differ_is_refused_before_the_start(config: type[Linear], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config().check(3)


def _away_from_plain_torch(found: dict[str, Any]) -> dict[str, float]:
    compared = found.keys() - DRAWS - MOVED_TWICE
    off = {arch: away(training.reference(arch), found[arch][0]) for arch in compared}
    return {arch: by for arch, by in off.items() if not by <= AGREES}


def _check_two_ranks(ranks: RankPool, alone: dict[str, Any]) -> None:
    first, second = ranks.run(training.train, sorted(alone), ranks=2, timeout_s=300)
    assert _faults(alone, first) == {}
    assert all(first[arch][0] == second[arch][0] for arch in alone)


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
