"""Initial weights: the rule's distribution, and the same numbers at every sharding."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bigtrain
from bigtrain.models.config import FAMILIES
from bigtrain.models.init import block_seed, initialise


def test_residual_projections_are_scaled_by_the_number_of_branches(
    make_decoder: Callable[..., nn.Module],
) -> None:
    model = make_decoder("gpt2", width=128, layers=2)
    state = model.state_dict()
    assert state["layers.0.mlp.up.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert state["layers.1.mlp.down.weight"].std() == pytest.approx(0.01, rel=0.02)
    assert state["layers.1.attention.output.weight"].std() == pytest.approx(0.01, rel=0.03)
    assert (state["layers.0.attention_norm.weight"] == 1).all()
    assert (state["layers.0.attention.query.bias"] == 0).all()


def test_another_seed_name_or_block_draws_other_numbers(make_decoder: Callable[..., nn.Module]) -> None:
    model = make_decoder("llama", width=64, mlp_width=512)
    first, second = (model.state_dict()[f"layers.{layer}.mlp.up.weight"].clone() for layer in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first[:256], first[256:])
    initialise(model, seed=2)
    assert not torch.equal(first, model.state_dict()["layers.0.mlp.up.weight"])


def test_a_shape_grown_by_rows_keeps_its_first_blocks() -> None:
    small = FAMILIES["llama"](layers=1, width=16, heads=2, context=8).build(512)
    large = FAMILIES["llama"](layers=1, width=16, heads=2, context=8).build(600)
    for model in (small, large):
        initialise(model, seed=1)
    assert torch.equal(small.embedding.weight, large.embedding.weight[:512])


def test_a_model_built_on_meta_gets_the_same_weights(make_decoder: Callable[..., nn.Module]) -> None:
    expected = make_decoder("gpt2")
    with torch.device("meta"):
        model = expected.config.build(97)
    model.to_empty(device="cpu")
    initialise(model, seed=1)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


def test_a_parameter_without_a_rule_is_refused(make_decoder: Callable[..., nn.Module]) -> None:
    model = make_decoder("gpt2")
    model.initialisers = dict
    with pytest.raises(ValueError, match=r"embedding\.weight"):
        initialise(model, seed=1)


def test_seeds_have_63_bits_and_differ() -> None:
    seeds = {block_seed(seed, name, block) for seed in range(3) for name in "ab" for block in range(50)}
    assert len(seeds) == 300
    assert max(seeds) < 2**63


SHARDED = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch import nn
from bigtrain.models.config import FAMILIES
from bigtrain.models.init import initialise
from bigtrain.optim.optimizers.adamw import AdamWConfig

def build():
    return FAMILIES["llama"](layers=1, width=24, heads=2, mlp_width=301, context=8).build(610)

def rank(index, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=4)
    whole = build()
    initialise(whole, seed=1)
    expected = dict(whole.named_parameters())

    # FSDP over 4 ranks, materialised from meta, then one fused AdamW step.
    with torch.device("meta"):
        model = build()
    mesh = init_device_mesh("cpu", (4,))
    for _, block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    initialise(model, seed=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), expected[name]), name
    tokens = torch.arange(16).reshape(2, 8)
    batch = dict(tokens=tokens, targets=tokens + 1, weights=torch.ones(2, 8))
    for each in (model, whole):
        optimizer = AdamWConfig(lr=1e-2).build(each.named_parameters())
        each(batch).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), expected[name], rtol=0, atol=2e-6)

    # Other placements on a 2 x 2 mesh.
    grid = init_device_mesh("cpu", (2, 2))
    class Sharded(nn.Module):
        def __init__(self, placements):
            super().__init__()
            self.weight = nn.Parameter(distribute_tensor(torch.zeros(610, 24), grid, placements))
        def initialisers(self):
            from bigtrain.models.contract import Normal
            return {"weight": Normal(0.02)}
    results = []
    for placements in ([Replicate(), Shard(1)], [Shard(1), Shard(0)], [Shard(0), Shard(0)]):
        sharded = Sharded(placements)
        initialise(sharded, seed=1)
        results.append(sharded.weight.full_tensor())
    assert all(torch.equal(results[0], result) for result in results[1:])
    assert results[0].std() > 0.019
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(rank, (sys.argv[1],), nprocs=4, start_method="fork")
"""


@pytest.mark.slow
def test_any_sharding_draws_the_weights_of_one_process(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path)],
        cwd=Path(bigtrain.__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
