"""The process group of a rank and the named axes of the mesh."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bigtrain.parallel.config import LayoutConfig, Mesh

START_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """This process among the others, as torchrun's environment tells it."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int = 1

    @property
    def nodes(self) -> int:
        """Machines, each with as many ranks as this one."""
        return self.world_size // self.local_world_size

    @classmethod
    def from_environment(cls) -> Ranks:
        """torchrun's variables; a process started without them is alone."""
        read = os.environ.get
        names = ("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1")
        return cls(*(int(read(name, default)) for name, default in names))


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this rank, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def build_mesh(layout: LayoutConfig, ranks: Ranks, device: torch.device) -> tuple[Mesh, DeviceMesh | None]:
    """Join the process group and lay the named axes over it; one process needs neither."""
    sizes = layout.mesh(ranks.world_size)
    if ranks.world_size == 1:
        return sizes, None
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world_size, timeout=START_TIMEOUT)
    axes = asdict(sizes)
    return sizes, init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def gradient_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """The axes over which gradients are summed and the model is sharded; None where they hold one rank.

    Ranks of a cp group hold other parts of the same sequences, so they share the sharded model like dp_shard's.
    """
    replicas, shards, parts = (mesh[name].size() for name in ("dp_replicate", "dp_shard", "cp"))
    if replicas * shards * parts == 1:
        return None
    if parts == 1:
        return mesh["dp_replicate", "dp_shard"] if replicas > 1 else mesh["dp_shard"]
    shared = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    # Slicing a flattened axis by its name warns from torch 2.11 on; FSDP itself joins meshes like this.
    return DeviceMesh._concatenate([mesh["dp_replicate"], shared]) if replicas > 1 else shared
