"""A checkpoint moves between layouts: the state is equal to the bit, and training goes on as if it had not moved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from bigtrain.checkpoint import loader
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.saver import Saver
from bigtrain.engines.contract import Engine, Reloaded
from bigtrain.testing.equivalence import LR, OF_NUMBERS, How, What, build, gather, micro_batches
from bigtrain.testing.ranks import RankPool

STEP, MORE = 2, 3
SHAPE = {"arch": "llama", "layers": 4, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56}
WHAT = What({**SHAPE, "qk_norm": True, "dropout": 0.1, "tied": True})
EVERYTHING_SPREAD = {
    "name": "deepspeed",
    "zero": 3,
    "passthrough": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
}
HOWS = {
    "dp1": How(1),
    "dp3": How(3),
    "dp4": How(4),
    "tp4": How(4, {"tp": 4}),
    "tp2 x dp2": How(4, {"tp": 2}),
    "cp2 ulysses x dp2": How(4, {"cp": 2}),
    "tp2 x cp2 all_gather": How(4, {"tp": 2, "cp": 2, "cp_kind": "all_gather"}),
    "tp2 x hsdp2": How(4, {"tp": 2, "dp_replicate": 2}),
    "dp2": How(2),
    "pp2": How(2, {"pp": 2}),
    "pp2 interleaved": How(2, {"pp": 2, "pp_schedule": "interleaved", "pp_stages_per_rank": 2}),
    "tp2 x pp2": How(4, {"tp": 2, "pp": 2}),
    "pp4 x dp2": How(8, {"pp": 4}),
    "ZeRO 3 dp4": How(4, {}, EVERYTHING_SPREAD),
    "ZeRO 2 dp2": How(2, {}, {"name": "deepspeed", "zero": 2}),
    "ZeRO 0 tp2": How(2, {"tp": 2}, {"name": "deepspeed", "zero": 0}),
    "ZeRO 1 tp2 x dp2": How(4, {"tp": 2}, {"name": "deepspeed", "zero": 1}),
    "ZeRO 3 tp2 x dp2": How(4, {"tp": 2}, EVERYTHING_SPREAD),
    "ZeRO 1 pp2": How(2, {"pp": 2}, {"name": "deepspeed", "zero": 1}),
    "ZeRO 1 tp2 x pp2 x dp2": How(8, {"tp": 2, "pp": 2}, {"name": "deepspeed", "zero": 1}),
}


@dataclass
class Continued:
    """What a rank saw after the checkpoint."""

    losses: list[float]
    different: list[str]
    """Tensors that are not equal to what was saved."""


def steps(engine: Engine, what: What, how: How, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        batch = micro_batches(what, how, step, engine.data_parallel_rank, engine.data_parallel_size)
        losses.append(engine.train_step(step, batch, LR).read().loss)
    return losses


def save(what: What, how: How, directory: Path) -> list[float]:
    """Train, save, train on; the losses after the checkpoint."""
    engine = build(what, how)
    steps(engine, what, how, 0, STEP)
    state = engine.state()
    expected = gather(state)
    if dist.get_rank() == 0:
        save_file(expected, directory / "expected.safetensors")
    saver = Saver(directory / "checkpoints", CheckpointConfig(asynchronous=False), timeout_s=60)
    saver.save(STEP, state, progress={}, config_hash="c", identity="i")
    saver.close()
    losses = steps(engine, what, how, STEP, MORE)
    engine.close()
    return losses


def resume(what: What, how: How, directory: Path) -> Continued:
    """Load what another layout saved, compare it, train on."""
    engine = build(what, how)
    state = engine.state()
    loader.load(directory / "checkpoints", STEP, state)
    if isinstance(engine, Reloaded):
        engine.state_loaded()
    expected = load_file(directory / "expected.safetensors")
    found = gather(engine.state())
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not found[name].equal(tensor)]
    losses = steps(engine, what, how, STEP, MORE)
    engine.close()
    return Continued(losses, different)


@pytest.mark.parametrize(
    ("origin", "destinations"),
    [
        pytest.param("tp2 x dp2", ("dp1", "tp4"), marks=pytest.mark.slow),
        ("pp2 interleaved", ("dp1", "tp2 x pp2")),
        pytest.param("ZeRO 1 tp2 x dp2", ("tp2 x pp2",), marks=pytest.mark.slow),
        pytest.param("ZeRO 3 dp4", ("tp2 x pp2", "ZeRO 1 tp2 x pp2 x dp2"), marks=pytest.mark.slow),
        pytest.param("tp4", ("ZeRO 2 dp2", "ZeRO 3 tp2 x dp2", "ZeRO 0 tp2"), marks=pytest.mark.exhaustive),
        pytest.param("ZeRO 3 tp2 x dp2", ("dp3", "ZeRO 1 pp2"), marks=pytest.mark.slow),
        pytest.param("ZeRO 0 tp2", ("dp1", "ZeRO 3 dp4"), marks=pytest.mark.exhaustive),
        pytest.param("ZeRO 1 tp2 x pp2 x dp2", ("dp1", "tp4"), marks=pytest.mark.exhaustive),
        pytest.param("dp2", ("pp2", "pp2 interleaved", "pp4 x dp2"), marks=pytest.mark.slow),
        pytest.param("pp2", ("dp1", "tp2 x dp2"), marks=pytest.mark.exhaustive),
        pytest.param("pp4 x dp2", ("pp2", "tp4"), marks=pytest.mark.exhaustive),
        pytest.param("tp4", ("tp2 x hsdp2", "dp3"), marks=pytest.mark.exhaustive),
        pytest.param("dp3", ("tp2 x dp2", "tp4"), marks=pytest.mark.exhaustive),
        pytest.param("dp4", ("dp3",), marks=pytest.mark.exhaustive),
        pytest.param("tp2 x cp2 all_gather", ("dp3", "cp2 ulysses x dp2"), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_moves(ranks: RankPool, tmp_path: Path, origin: str, destinations: tuple[str, ...]) -> None:
    losses = ranks.run(save, WHAT, HOWS[origin], tmp_path, ranks=HOWS[origin].ranks)[0]
    for destination in destinations:
        how = HOWS[destination]
        for continued in ranks.run(resume, WHAT, how, tmp_path, ranks=how.ranks):
            assert not continued.different, destination
            assert continued.losses == pytest.approx(losses, rel=OF_NUMBERS), destination
