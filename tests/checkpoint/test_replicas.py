"""A bit that flips in one copy of the weights is found at the next save, by the rank that holds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.loader import load
from bigtrain.checkpoint.replicas import ReplicasDifferError
from bigtrain.checkpoint.saver import Saver
from bigtrain.testing.equivalence import LR, How, What, build, gather, micro_batches
from bigtrain.testing.ranks import RankPool

FACTS = {"progress": {}, "config_hash": "", "identity": ""}
WHAT = What({"arch": "llama", "layers": 2, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56})
STEPS, SAVED, FLIPPED = 5, 2, 3


def flip_a_bit(tensor: Tensor) -> None:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    local.detach().view(-1).view(torch.int32)[3] ^= 1 << 12


def train(how: How, directory: Path, name: str, rank: int | None) -> tuple[str, dict[str, Tensor]]:
    """Five steps, saved after two and three; a bit flips before the second save, and the first one brings it right."""
    engine = build(WHAT, how)
    saver = Saver(directory, CheckpointConfig(check_replicas=True, asynchronous=False))
    said, step = "", 0
    while step < STEPS:
        batch = micro_batches(WHAT, how, step, engine.data_parallel_rank, engine.data_parallel_size)
        engine.train_step(step, batch, LR).read()
        step += 1
        if step == FLIPPED and not said and rank is not None and torch.distributed.get_rank() == rank:
            flip_a_bit(engine.state()[name])
        if step in (SAVED, FLIPPED):
            try:
                saver.save(step, engine.state(), **FACTS)
            except ReplicasDifferError as error:
                said = str(error)
                load(directory, SAVED, engine.state())
                step = SAVED
    saver.close()
    state = gather(engine.state())
    engine.close()
    return said, state


CASES = {
    "hsdp3": (How(3, {"dp_replicate": 3}), "model.layers.1.mlp.up.weight", 1, r"^rank 1: .*mlp.up.weight.*the others"),
    "two replicas": (
        How(2, {"dp_replicate": 2}),
        "optimizer.head.weight.exp_avg",
        1,
        "ranks 0, 1: .*no majority",
    ),
    "tp2, a norm": (How(2, {"tp": 2}), "model.norm.weight", 0, "ranks 0, 1: .*model.norm.weight"),
}


@pytest.mark.parametrize(
    "case", [name if name == "hsdp3" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_flipped_bit_in_one_replica_is_found_and_the_run_goes_on_as_if_it_had_not_been(
    case: str, ranks: RankPool, tmp_path: Path
) -> None:
    how, name, rank, expected = CASES[case]
    clean = ranks.run(train, how, tmp_path / "clean", name, None, ranks=how.ranks)
    results = ranks.run(train, how, tmp_path / "flipped", name, rank, ranks=how.ranks)
    for (said, state), (nothing, undisturbed) in zip(results, clean, strict=True):
        assert not nothing
        assert said == results[0][0]
        assert all(torch.equal(value, undisturbed[key]) for key, value in state.items())
    assert re.search(expected, results[0][0])
