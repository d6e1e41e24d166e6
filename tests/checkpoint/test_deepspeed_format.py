"""Checkpoints go to DeepSpeed's universal format and come back: DeepSpeed itself loads them and trains on as we do."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from bigtrain.checkpoint import loader
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.deepspeed_format import from_deepspeed, to_deepspeed
from bigtrain.checkpoint.saver import Saver
from bigtrain.config import CorruptionError, UserError
from bigtrain.testing.equivalence import LR, MODELS, OF_NUMBERS, How, build, gather, micro_batches
from bigtrain.testing.ranks import RankPool

STEP, MORE = 2, 2
WHAT = MODELS["llama-gqa-tied-qk-norm-documents"]


def steps(engine: Any, how: How, first: int, count: int) -> list[tuple[float, float]]:
    found = []
    for step in range(first, first + count):
        batch = micro_batches(WHAT, how, step, engine.data_parallel_rank, engine.data_parallel_size)
        numbers = engine.train_step(step, batch, LR).read()
        found.append((numbers.loss, numbers.gradient_norm))
    return found


def train_and_save(directory: Path) -> list[tuple[float, float]]:
    """The losses and norms of the steps after the checkpoint."""
    how = How(2)
    engine = build(WHAT, how)
    steps(engine, how, 0, STEP)
    state = engine.state()
    expected = gather(state)
    if dist.get_rank() == 0:
        save_file(expected, directory / "expected.safetensors")
    saver = Saver(directory / "checkpoints", CheckpointConfig(asynchronous=False), timeout_s=60)
    saver.save(STEP, state, progress={}, config_hash="c", identity="i")
    saver.close()
    after = steps(engine, how, STEP, MORE)
    engine.close()
    return after


def load_in_deepspeed(stage: int, directory: Path) -> tuple[list[str], list[tuple[float, float]]]:
    """What differs after DeepSpeed's own `load_checkpoint`, and the steps after it."""
    passthrough: dict[str, Any] = {"checkpoint": {"load_universal": True}}
    if stage == 3:
        passthrough["zero_optimization"] = {"stage3_param_persistence_threshold": 0}
    how = How(2, {}, {"name": "deepspeed", "zero": stage, "passthrough": passthrough})
    engine = build(WHAT, how)
    engine.state()
    path, _ = engine.engine.load_checkpoint(str(directory))
    assert path is not None
    if stage == 3:
        # DeepSpeed 0.19.8 gives all parts of ZeRO 3 one tensor to count steps in, which the update of each raises.
        zero = engine.engine.optimizer
        for flat in zero.fp32_partitioned_groups_flat:
            engine.optimizer.state[flat]["step"] = engine.optimizer.state[flat]["step"].clone()
    expected, found = load_file(directory.parent / "expected.safetensors"), gather(engine.state())
    assert expected.keys() == found.keys()
    different = [name for name, tensor in expected.items() if not found[name].equal(tensor)]
    after = steps(engine, how, STEP, MORE)
    engine.close()
    return different, after


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param((2,), id="ZeRO 2", marks=pytest.mark.slow),
        pytest.param((1, 3), id="ZeRO 1 and 3", marks=pytest.mark.slow),
    ],
)
def test_deepspeed_loads_what_was_converted_and_trains_on_alike(
    ranks: RankPool, tmp_path: Path, stages: tuple[int, ...]
) -> None:
    after = ranks.run(train_and_save, tmp_path)[0]
    to_deepspeed(tmp_path / "checkpoints", STEP, tmp_path / "converted")
    for stage in stages:
        different, found = ranks.run(load_in_deepspeed, stage, tmp_path / "converted")[0]
        assert not different
        for mine, other in zip(found, after, strict=True):
            assert mine == pytest.approx(other, rel=OF_NUMBERS)


def test_a_converted_checkpoint_comes_back_to_the_bit(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(train_and_save, tmp_path)
    to_deepspeed(tmp_path / "checkpoints", STEP, tmp_path / "converted")
    assert from_deepspeed(tmp_path / "converted", tmp_path / "back", trusted=True) == STEP
    expected = load_file(tmp_path / "expected.safetensors")
    found = loader.read_tensors(tmp_path / "back" / "checkpoints", STEP, prefix="")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(UserError, match="pickles"):
        from_deepspeed(tmp_path / "converted", tmp_path / "untrusted", trusted=False)
    assert not (tmp_path / "untrusted").exists()


class Planted:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_trusted_checkpoint_runs_nothing_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "global_step1" / "zero" / "weight"
    folder.mkdir(parents=True)
    torch.save({"param": Planted(tmp_path / "executed")}, folder / "fp32.pt")
    with pytest.raises(CorruptionError, match="plain values"):
        from_deepspeed(tmp_path / "global_step1", tmp_path / "out", trusted=True)
    (folder / "fp32.pt").write_bytes(pickle.dumps(Planted(tmp_path / "executed")))
    with pytest.raises(CorruptionError):
        from_deepspeed(tmp_path / "global_step1", tmp_path / "out", trusted=True)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


def test_flat_tensors_without_shapes_are_refused(tmp_path: Path) -> None:
    """ZeRO 3 stores each parameter flat, and its shape in the files *_model_states.pt."""
    place = tmp_path / "global_step1"
    shapes = {"weight": torch.Size((2, 3)), "bias": torch.Size((2,))}
    for name, shape in shapes.items():
        (place / "zero" / name).mkdir(parents=True)
        for file in ("fp32", "exp_avg", "exp_avg_sq"):
            torch.save({"param": torch.ones(shape.numel())}, place / "zero" / name / f"{file}.pt")
        torch.save(torch.tensor(1.0), place / "zero" / name / "step.pt")
    with pytest.raises(UserError, match="shape of bias and of 1 other") as refused:
        from_deepspeed(place, tmp_path / "out", trusted=True)
    assert "model_states.pt" in str(refused.value)
    torch.save({"param_shapes": [shapes]}, place / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert from_deepspeed(place, tmp_path / "out", trusted=True) == 1
    found = loader.read_tensors(tmp_path / "out" / "checkpoints", 1, prefix="model.")
    assert sorted(tuple(one.shape) for one in found.values()) == [(2,), (2, 3)]


def test_what_is_no_universal_checkpoint_is_refused_with_the_way_to_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no DeepSpeed universal checkpoint") as refused:
        from_deepspeed(tmp_path, tmp_path / "out", trusted=True)
    assert "ds_to_universal" in str(refused.value)
