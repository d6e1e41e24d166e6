"""Builds a parallel model from its config: applies every kind of parallelism, in the only order that is correct."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from bigtrain.models.config import BlockCosts, ModelConfig
from bigtrain.models.init import materialise
from bigtrain.parallel.config import LayoutConfig, Recompute
from bigtrain.parallel.context import ContextGroup, share_sequences
from bigtrain.parallel.mesh import gradient_mesh
from bigtrain.parallel.pipeline import Cut, Pipeline, cut
from bigtrain.parallel.recompute import recompute_blocks
from bigtrain.parallel.shard import shard
from bigtrain.parallel.tensor import TensorGroup, split


@dataclass(frozen=True)
class ParallelModel:
    """This rank's part of a parallel model."""

    module: nn.Module
    """The model, or this rank's stages of it. Its parameters are FP32: DTensors if sharded, else plain tensors."""

    tensor_partial: frozenset[str] = field(default_factory=frozenset)
    """Names of parameters whose gradients are to be summed over the tp axis."""

    context: ContextGroup | None = None
    """The context-parallel group, which takes this rank's part of each batch; None without context parallelism."""

    pipeline: Pipeline | None = None
    """Runs micro-batches through this rank's stages; None without pipeline parallelism."""

    shared_by_ends: frozenset[str] = field(default_factory=frozenset)
    """Names of parameters that the first and the last stage both hold."""

    all_names: Collection[str] | None = None
    """Names of all stages' parameters; None if this rank holds all of them."""


def build_parallel_model(
    config: ModelConfig,
    vocab_size: int,
    *,
    layout: LayoutConfig,
    mesh: DeviceMesh | None,
    device: torch.device,
    compute_dtype: torch.dtype,
    seed: int,
    recompute: Recompute = "none",
    compile_blocks: bool = False,
) -> ParallelModel:
    """Build a model and apply pp, tp, cp, recompute, compile and FSDP in this order; then allocate and initialise it.

    The initial weights are equal at every layout. A model is built on the meta device, so that no rank ever holds more
    than its part. Only a plain module that initialises itself is built in full, on the CPU of each rank.
    """
    whole = cast(Any, config.build_for_engine(vocab_size, seed))
    whole.compute_dtype = compute_dtype
    costs = cast(BlockCosts, config.block_costs(vocab_size))
    pp = mesh["pp"] if mesh is not None and mesh["pp"].size() > 1 else None
    stages = Cut.nothing(whole) if pp is None else cut(whole, layout.split(costs), pp)
    partial: set[str] = set()
    context = None
    for model in list[Any](stages.own):
        blocks = [block for _, block in model.blocks()]
        groups = []
        if mesh is not None and mesh["tp"].size() > 1:
            groups.append(mesh["tp"].get_group())
            tensor = TensorGroup(groups[-1], layout.sequence_parallel, layout.loss_parallel)
            partial |= split(model, tensor, mesh["tp"]).partial
        if mesh is not None and mesh["cp"].size() > 1:
            groups.append(mesh["cp"].get_group())
            context = share_sequences(model, layout.cp_kind, groups[-1])
        recompute_blocks(blocks, recompute, groups=groups, compiled=compile_blocks)
        if compile_blocks:
            for block in blocks:
                block.compile()
        if mesh is not None and (over := gradient_mesh(mesh)) is not None:
            held = getattr(model, "held", ())  # of a plain module
            shard(model, blocks, over, compute_dtype, reshard_after_forward=pp is None, held=held)
        materialise(model, device, seed)
    if pp is None:
        return ParallelModel(whole, frozenset(partial), context)
    return ParallelModel(
        stages.own,
        frozenset(partial),
        context,
        pipeline=Pipeline(stages.own, layout.stages, layout.pp_schedule, pp, device, context),
        shared_by_ends=stages.shared,
        all_names=stages.names,
    )
