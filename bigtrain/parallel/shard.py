"""Fully sharded data parallelism (ZeRO-3) with PyTorch's FSDP2: a block's parameters are gathered when it computes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard

from bigtrain.config import UserError


def shard(
    model: nn.Module,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    *,
    reshard_after_forward: bool = True,
    held: Collection[str] = (),
) -> None:
    """Shard every block, then the rest of the model, in place.

    Parameters that FSDP cannot shard (scalars, not FP32, or `held`) stay unsharded on each rank; the engine sums their
    gradients. Gradients are summed, never averaged: the engine divides once, by the global sum of weights.

    Args:
        mesh: One axis of shards, or two axes: replicas, then shards (HSDP).
        reshard_after_forward: Whether a block's parameters are freed after its forward pass. Pipeline stages use False
            and keep them until the last backward pass of a step, instead of gathering them for each micro-batch.
        held: Names of parameters that other objects than modules hold, so that they must not be replaced.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    ranks = mesh.size(mesh.ndim - 1)

    def placement(parameter: nn.Parameter) -> Shard:
        return _placement(parameter, ranks)

    whole = {
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 0 or parameter.dtype != torch.float32 or name in held
    }
    for module in (*blocks, model):
        # The last block stays gathered, because the backward pass begins with it.
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            shard_placement_fn=placement,
            reshard_after_forward=reshard_after_forward and module is not model and module is not blocks[-1],
            ignored_params=whole or None,
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo does not support PREMUL_SUM.


def begin_pass(model: nn.Module, *, last: bool) -> None:
    """Prepare FSDP for the next pass (forward and backward of a micro-batch).

    Between two passes of a step, the parameters of the root and the first block stay gathered: the backward pass ends
    with them, and the next forward pass begins with them. This does not increase the peak memory. Each pass
    reduce-scatters gradients, because unsharded ones would take as much memory as the model in FP32. Replicas
    all-reduce the shards once, in the last pass.

    Args:
        last: Whether the pass is the last one of the step.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_all_reduce(last)
    model.set_reshard_after_backward(last, recurse=False)
    for _, block in cast(Any, model).blocks()[:1]:
        block.set_reshard_after_backward(last, recurse=False)


def reshard(module: nn.Module) -> None:
    """Free the parameters that FSDP has gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _placement(parameter: nn.Parameter, ranks: int) -> Shard:
    """The dimension to shard: 0 (rows), or 1 if tp has already split the rows unevenly.

    A DTensor cannot describe rows that are split twice and unevenly. It would assign some rows to the wrong rank, in
    checkpoints and in initial weights.
    """
    if not isinstance(parameter, DTensor):
        return Shard(0)
    uneven = any(at.is_shard(0) and parameter.shape[0] % tp for at, tp in _axes(parameter))
    if not uneven:
        return Shard(0)
    rows, width = parameter.shape
    if width % ranks:
        raise UserError(
            f"tp does not divide the {rows} rows of the vocabulary, and {ranks} ranks do not divide the model's width "
            f"{width}",
            "layout",
            fix="Set model.vocab_multiple to layout.tp (in a new run), or change dp_shard.",
        )
    return Shard(1)


def _axes(parameter: DTensor) -> list[tuple[Placement, int]]:
    return [(placement, parameter.device_mesh.size(axis)) for axis, placement in enumerate(parameter.placements)]
