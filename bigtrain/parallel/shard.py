"""Fully sharded data parallelism (ZeRO-3, as PyTorch's FSDP2): each block gathered when it computes."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard every block, then what is left, over the mesh's data-parallel axes, in place.

    Gradients are summed, never averaged: the engine divides once, by the global sum of weights.
    """
    axes = mesh if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=axes, mp_policy=policy)
    fully_shard(model, mesh=axes, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
