"""Builds a DeepSpeed engine from the config's sections."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn

from bigtrain.engines.config import EngineParts
from bigtrain.engines.deepspeed.config import DeepSpeedConfig
from bigtrain.engines.deepspeed.engine import DeepSpeedEngine, Started
from bigtrain.engines.deepspeed.groups import ModelParallelUnit, count_once_in_norm
from bigtrain.engines.deepspeed.model import plan_model, spread
from bigtrain.engines.deepspeed.settings import check_passthrough, deepspeed_config, low_precision_weights
from bigtrain.engines.deepspeed.start import import_deepspeed, join_process_group
from bigtrain.engines.rank import COMPUTE_DTYPES, set_determinism
from bigtrain.models.init import initialise
from bigtrain.parallel.config import Mesh
from bigtrain.parallel.mesh import build_mesh, pick_device
from bigtrain.parallel.recompute import recompute_blocks
from bigtrain.parallel.tensor import sum_gradients_as_they_come


def build_deepspeed_engine(engine: DeepSpeedConfig, parts: EngineParts) -> DeepSpeedEngine:
    """Build process group, model, optimizer and engine from the config's sections. Collective.

    Raises:
        UserError: `passthrough` has a key or a value that DeepSpeed does not accept.
    """
    optimizer, layout, precision, ranks = parts.optimizer, parts.layout, parts.precision, parts.ranks
    device = pick_device(ranks.local_rank)
    set_determinism(engine, device)
    deepspeed = import_deepspeed(device)
    join_process_group(deepspeed, ranks, device)
    sizes, mesh = build_mesh(layout, ranks, device)
    config = deepspeed_config(engine, precision, device, pipelined=sizes.pp > 1)
    check_passthrough(config, engine.passthrough)
    built, plan = plan_model(parts.model, parts.vocab_size, layout, mesh)
    unit = ModelParallelUnit(mesh) if mesh is not None and sizes.tp > 1 and sizes.pp == 1 else None
    # The optimizer needs the full (unsharded) shapes; some of the parameters built so far have the shapes of shards.
    with torch.device("meta"):
        shapes = ((name, nn.Parameter(torch.empty(shape))) for name, shape in plan.shapes.items())
        inner = optimizer.build(shapes, plan.all_names, parts.model.lr_scale)
    dtype = torch.bfloat16 if low_precision_weights(engine, precision) else torch.float32
    if engine.zero == 3:
        group = None if unit is None else unit.get_data_parallel_group()
        spread(deepspeed, built, config=config, group=group, device=device, dtype=dtype)
    else:
        built.to_empty(device=device)
        initialise(built, parts.seed, plan.parts)
    built.compute_dtype = COMPUTE_DTYPES[precision]
    groups = [] if mesh is None or sizes.tp == 1 else [mesh["tp"].get_group()]
    recompute_blocks([block for _, block in built.blocks()], engine.recompute, groups=groups)
    parameters = dict(built.named_parameters())
    for settings in inner.param_groups:
        settings["params"] = [parameters[name] for name in settings["names"]]
    module, made = built, DeepSpeedEngine
    if sizes.pp > 1:
        assert mesh is not None
        from bigtrain.engines.deepspeed.pipeline import PipelinedEngine, pipeline_module

        module, made = pipeline_module(built, plan, sizes, mesh), PipelinedEngine
    count_once_in_norm(parameters, plan.parts, plan.shared_by_ends & plan.copies)
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use.
        started, *_ = deepspeed.initialize(model=module, optimizer=inner, config=config, mpu=unit)
    _check_got(started, engine, dtype, sizes)
    if mesh is not None and plan.partial:
        sum_gradients_as_they_come(built, plan.partial, mesh["tp"].get_group())
    stream_is_part = layout.sequence_parallel and sizes.tp > 1
    return made(
        Started(deepspeed, started, built, inner, plan, sizes, stream_is_part),
        clip=optimizer.clip, seed=parts.seed, device=device,
    )  # fmt: skip


def _check_got(started: Any, engine: DeepSpeedConfig, dtype: torch.dtype, sizes: Mesh) -> None:
    """Check that DeepSpeed uses the requested ZeRO stage, weight dtype and group size; it may replace them silently."""
    got = {parameter.dtype for parameter in started.module.parameters()}
    stage = int(started.zero_optimization_stage())
    if stage != engine.zero or got != {dtype}:
        found = ", ".join(map(str, got))
        raise RuntimeError(f"DeepSpeed was set to ZeRO {engine.zero} with {dtype}, but runs ZeRO {stage} with {found}")
    if started.dp_world_size != sizes.data_parallel:
        raise RuntimeError(f"DeepSpeed reduces over {started.dp_world_size} ranks, not over {sizes.data_parallel}")
