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
    """This process's ranks and world sizes, from torchrun's environment variables."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int = 1

    @property
    def nodes(self) -> int:
        """Number of nodes; all have the same number of ranks."""
        return self.world_size // self.local_world_size

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read torchrun's environment variables; without them, this process is the only rank."""
        read = os.environ.get
        names = ("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1")
        return cls(*(int(read(name, default)) for name, default in names))


def pick_device(local_rank: int) -> torch.device:
    """Select this rank's GPU as the current device and return it; the CPU if there is no GPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def build_mesh(layout: LayoutConfig, ranks: Ranks, device: torch.device) -> tuple[Mesh, DeviceMesh | None]:
    """Join the default process group and create the device mesh with its named axes. Collective.

    Returns:
        The sizes of the axes, and the mesh; None instead of the mesh in a single process, which joins no group.
    """
    sizes = layout.mesh(ranks.world_size)
    if ranks.world_size == 1:
        return sizes, None
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world_size, timeout=START_TIMEOUT)
    axes = asdict(sizes)
    return sizes, init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def gradient_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """The axes over which gradients are summed and the model is sharded; None if they consist of one rank.

    The cp axis is included: its ranks compute other parts of the same sequences, so FSDP shards over it as over
    dp_shard.
    """
    replicas, shards, parts = (mesh[name].size() for name in ("dp_replicate", "dp_shard", "cp"))
    if replicas * shards * parts == 1:
        return None
    if parts == 1:
        return mesh["dp_replicate", "dp_shard"] if replicas > 1 else mesh["dp_shard"]
    shared = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    # torch 2.11 and later warn if a flattened axis is sliced by name. FSDP itself concatenates meshes like this.
    return DeviceMesh._concatenate([mesh["dp_replicate"], shared]) if replicas > 1 else shared
