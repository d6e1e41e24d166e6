"""The record of collectives: whoever issues one, it is seen, named and measured."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from bigtrain.parallel.config import Mesh
from bigtrain.planning.communication import Collective
from bigtrain.planning.rehearsal.recorded import RecordedCollectives, _axes_by_ranks
from bigtrain.testing.ranks import RankPool


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def everyone() -> tuple[list[Collective], dict[tuple[str, ...], int]]:
    """Plain calls, functional ones, DTensor's, autograd's, DDP's from C++, messages, and one behind the back."""
    rank, sizes = dist.get_rank(), Mesh(dp_shard=2)
    x = torch.ones(6)
    replicated = DistributedDataParallel(nn.Linear(3, 2))
    mesh = init_device_mesh("cpu", (2,))
    spread = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    with RecordedCollectives(sizes) as record:
        dist.all_reduce(x)
        all_reduce(x, "sum", dist.group.WORLD).wait()
        spread.redistribute(placements=[Replicate()])
        _SumGradient.apply(torch.ones(5, requires_grad=True)).sum().backward()
        replicated(torch.ones(1, 3)).sum().backward()
        dist.send(x[:2], 1) if rank == 0 else dist.recv(x[:2], 0)
        dist.barrier()
    return list(record), record.missed


def behind_the_back() -> dict[tuple[str, ...], int]:
    with RecordedCollectives(Mesh(dp_shard=2)) as record:
        guard = torch._C._DisableTorchDispatch()
        dist.all_reduce(torch.ones(3))
        del guard
    return record.missed


def test_every_collective_is_seen_whoever_issues_it(ranks: RankPool) -> None:
    for rank, (seen, missed) in enumerate(ranks.run(everyone)):
        expected = Counter(
            {("all_reduce", 24): 2, ("all_gather", 16): 1, ("all_reduce", 20): 1, ("all_reduce", 32): 1,
             ("send" if rank == 0 else "recv", 8): 1, ("barrier", 0): 1}
        )  # fmt: skip
        assert Counter((one.kind, one.bytes) for one in seen) == expected
        assert {one.axes for one in seen} == {("dp_shard",)}
        assert not missed


def test_unrecorded_collectives_are_reported(ranks: RankPool) -> None:
    assert ranks.run(behind_the_back) == [{("dp_shard",): 1}] * 2


def test_groups_bear_the_names_of_the_axes_that_they_span() -> None:
    names = _axes_by_ranks(Mesh(pp=3, dp_shard=2, tp=2))
    assert names[0, 1] == names[10, 11] == ("tp",)
    assert names[0, 2] == ("dp_shard",)
    assert names[0, 1, 2, 3] == ("dp_shard", "tp")
    assert names[0, 4, 8] == ("pp",)
    assert names[0, 8] == ("ends of pp",)
    assert names[tuple(range(12))] == ("pp", "dp_shard", "tp")
