"""From a model's config to a model that lies on the ranks: every technique, in the one order that is right."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from bigtrain.models.check import check_module
from bigtrain.models.config import ModelConfig
from bigtrain.models.init import initialise
from bigtrain.parallel.shard import shard


def build_parallel_model(
    config: ModelConfig,
    vocab_size: int,
    *,
    mesh: DeviceMesh | None,
    device: torch.device,
    compute_dtype: torch.dtype,
    seed: int,
) -> nn.Module:
    """Build on meta, shard, materialise, initialise: no rank ever holds more than its part of the model.

    Returns:
        The model on `device`, its parameters FP32 (DTensors where there is a mesh) and equal at every layout.
    """
    with torch.device("meta"):
        model = cast(Any, config.build(vocab_size))
    check_module(model, f"the model of arch '{config.arch}'")
    model.compute_dtype = compute_dtype
    if mesh is not None:
        shard(model, [block for _, block in model.blocks()], mesh, compute_dtype)
    model.to_empty(device=device)
    initialise(model, seed)
    return model
