"""What each rank of a group does that saves, or loads, a small model sharded by FSDP2; see `test_ranks.py`.

As a script, with a directory and torchrun's RANK and WORLD_SIZE: the rank of a group that loses its last one in a save.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from bigtrain.checkpoint import commit, loader
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.ranks import RankGroup, RanksLostError, WorkFailedError
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.state import flatten, materialise_optimizer
from bigtrain.config import CorruptionError, UserError
from bigtrain.optim.optimizers.adamw import AdamWConfig

FACTS: dict[str, Any] = {"progress": {"tokens": 7}, "config_hash": "c", "identity": "i"}


def is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


class Uneven(nn.Module):
    """Sizes that are not divisible by the number of ranks, fewer rows than ranks, a tied head, a scalar buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 5)
        self.wide = nn.Linear(5, 5)
        self.narrow = nn.Linear(5, 1)
        self.head = nn.Linear(5, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.wide(self.embedding(tokens)) * self.scale
        return self.head(hidden).square().mean() + self.narrow(hidden).mean()


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Uneven()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = AdamWConfig(lr=0.1).build(model.named_parameters())
    materialise_optimizer(optimizer)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        model(torch.arange(13).roll(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def full(state: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}
    return {name: tensor.detach().clone() for name, tensor in whole.items()}


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    gathered = full(state)
    assert gathered.keys() == expected.keys()
    for name, tensor in gathered.items():
        assert torch.equal(tensor, expected[name]), name


def agree(value: object) -> None:
    """Every rank sees the same."""
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert all(other == value for other in values), values


def raised(kind: type[Exception], work: Callable[[], object]) -> Any:
    """The exception of a kind that every rank must raise, in the same words."""
    try:
        work()
    except kind as error:
        agree(str(error))
        return error
    raise AssertionError(f"rank {dist.get_rank()} raised no {kind.__name__}")


def save(root: Path) -> list[int]:
    """What one rank of four sees of four saves; the steps that are kept."""
    directory = root / "checkpoints"
    model, optimizer = build(seed=0)
    train(model, optimizer, 3)
    state = flatten(model, optimizer)
    expected = full(state)
    if dist.get_rank() == 0:
        save_file(expected, root / "expected.safetensors")
    saver = Saver(directory, CheckpointConfig(), timeout_s=60)
    saver.save(3, state, **FACTS)
    # The default group is in use, and the tensors change, while the other group carries the save.
    train(model, optimizer, 5)
    outcome = saver.wait()
    assert outcome is not None
    assert outcome.status == "saved", outcome
    train(model, optimizer, 1)
    after = full(flatten(model, optimizer))
    fail_on_one_rank(saver, directory, state)
    saver.save(9, state, **FACTS)
    saver.wait()
    agree(saver.failures)
    assert saver.failures == 0
    saver.close()
    assert_equal(state, after)
    loader.load(directory, 3, state)
    assert_equal(state, expected)
    refuse_a_writer_whose_lease_is_lost(directory, state)
    return [found.step for found in commit.list_checkpoints(directory)]


def fail_on_one_rank(saver: Saver, directory: Path, state: dict[str, Tensor]) -> None:
    """Only the last rank cannot write; all see the same failure and nothing is left of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if is_last():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    saver.save(8, state, **FACTS)
    outcome = saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome is not None
    assert outcome.status == "failed"
    assert f"rank {dist.get_world_size() - 1}" in (outcome.cause or "")
    agree((outcome.status, outcome.cause, saver.failures, saver.must_stop))
    assert [found.step for found in commit.list_checkpoints(directory)] == [3]
    assert not list(directory.glob("*.tmp-*"))


def refuse_a_writer_whose_lease_is_lost(directory: Path, state: dict[str, Tensor]) -> None:
    fenced = Saver(directory, CheckpointConfig(asynchronous=False), may_publish=lambda: False, timeout_s=60)
    fenced.save(10, state, **FACTS)
    agree(fenced.must_stop)
    assert fenced.must_stop
    fenced.close()
    assert commit.newest_verified(directory) == (9, [])


def load(root: Path) -> int:
    """What one rank of two sees of what four saved; the newest sound step."""
    directory = root / "checkpoints"
    expected = load_file(root / "expected.safetensors")
    model, optimizer = build(seed=1)
    state = flatten(model, optimizer)
    manifest = loader.load(directory, 3, state)
    assert (manifest.world_size, manifest.progress) == (4, {"tokens": 7})
    assert_equal(state, expected)
    saver = Saver(directory, CheckpointConfig(asynchronous=False), timeout_s=60)
    saver.save(11, state, **FACTS)
    saver.close()
    names_that_do_not_fit(directory, state)
    errors_that_cannot_be_pickled()
    if dist.get_rank() == 0:
        shard = directory / "step_00000011" / "__1_0.distcp"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    found = loader.find(directory)
    assert found is not None
    agree((found.step, found.warnings))
    assert found.step == 9
    raised(CorruptionError, lambda: loader.load(directory, 11, state))
    assert_equal(state, expected)
    return found.step


def names_that_do_not_fit(directory: Path, state: dict[str, Tensor]) -> None:
    """One rank requests a missing tensor: every rank gets the error and none is changed."""
    wanted = state | ({"model.wide.weights": torch.zeros(1)} if is_last() else {})
    error = raised(UserError, lambda: loader.load(directory, 3, wanted))
    assert "model.wide.weights" in error.what
    assert "model.wide.weight" in error.fix
    # Under pipeline parallelism no rank has all names, and together they do.
    mine = dict(list(state.items())[dist.get_rank() :: dist.get_world_size()])
    plain = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in mine.items()}
    loader.load(directory, 3, plain)


def errors_that_cannot_be_pickled() -> None:
    def work() -> None:
        if dist.get_rank() == 1:
            error = ValueError("boom")
            error.handle = sys.stdout  # type: ignore[attr-defined]
            raise error

    error = raised(WorkFailedError, lambda: RankGroup(dist.group.WORLD).together(work))
    assert "rank 1: ValueError: boom" in str(error)


def die(root: Path) -> None:
    """The last rank is killed in the middle of a save; the others get an error at once."""

    def hook(phase: str) -> None:
        if phase == "shards" and armed and is_last():
            os.kill(os.getpid(), signal.SIGKILL)

    armed = False
    model, optimizer = build(seed=0)
    saver = Saver(root / "die", CheckpointConfig(), phase_hook=hook, timeout_s=120)
    saver.save(1, flatten(model, optimizer), **FACTS)
    saver.wait()
    armed = True
    began = time.monotonic()
    saver.save(2, flatten(model, optimizer), **FACTS)
    try:
        saver.wait()
        raise AssertionError("a save without its last rank was reported as done")
    except RanksLostError:
        # By the broken connection, long before the timeout.
        assert time.monotonic() - began < 60
    assert commit.newest_verified(root / "die") == (1, [])
    os._exit(0)


def main() -> None:
    root, rank, size = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{root}/store-die", rank=rank, world_size=size)
    die(root)


if __name__ == "__main__":
    main()
