"""From a model's config to a model that lies on the ranks: every technique, in the one order that is right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from bigtrain.engines.config import Recompute
from bigtrain.models.check import check_module
from bigtrain.models.config import ModelConfig
from bigtrain.models.init import initialise
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import gradient_mesh
from bigtrain.parallel.recompute import recompute_blocks
from bigtrain.parallel.shard import shard
from bigtrain.parallel.tensor import TensorGroup, split


@dataclass(frozen=True)
class ParallelModel:
    """A model as it lies on this rank."""

    module: nn.Module
    """Its parameters are FP32: DTensors where ranks share them, else plain tensors."""

    tensor_partial: frozenset[str] = field(default_factory=frozenset)
    """Parameters whose gradients are to be summed over the tp axis."""


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
    """Build on meta, split, recompute, compile, shard, materialise, initialise.

    No rank ever holds more than its part of the model, and the initial weights are equal at every layout.
    """
    with torch.device("meta"):
        model = cast(Any, config.build(vocab_size))
    check_module(model, f"the model of arch '{config.arch}'")
    model.compute_dtype = compute_dtype
    blocks = [block for _, block in model.blocks()]
    tensor_partial: frozenset[str] = frozenset()
    groups = []
    if mesh is not None and mesh["tp"].size() > 1:
        groups.append(mesh["tp"].get_group())
        tensor = TensorGroup(groups[-1], layout.sequence_parallel, layout.loss_parallel)
        tensor_partial = split(model, tensor, mesh["tp"]).partial
    recompute_blocks(blocks, recompute, groups=groups, compiled=compile_blocks)
    if compile_blocks:
        for block in blocks:
            block.compile()
    if mesh is not None and (over := gradient_mesh(mesh)) is not None:
        shard(model, blocks, over, compute_dtype)
    model.to_empty(device=device)
    initialise(model, seed)
    return ParallelModel(model, tensor_partial)
