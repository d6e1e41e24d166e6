"""Native models in the form that DeepSpeed accepts: plain tensors that hold this rank's shards under tp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from bigtrain.models.config import BlockCosts, ModelConfig
from bigtrain.models.contract import Init
from bigtrain.models.init import Part
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.pipeline import Cut, cut
from bigtrain.parallel.tensor import TensorGroup, split


@dataclass(frozen=True)
class Plan:
    """Names and shapes of this rank's parameters, recorded before ZeRO 3 empties the tensors of the built model."""

    shapes: dict[str, torch.Size]
    """Full (unsharded) shapes of the parameters of this rank's stage, by qualified name, in the model's order."""
    initialisers: dict[str, Init]
    all_names: tuple[str, ...]
    """Names of the parameters of all stages."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """This rank's shard of each parameter that is sharded over the tp axis, by name."""
    partial: frozenset[str] = frozenset()
    """Names of parameters that tp does not shard, but whose gradients are to be summed over the tp axis."""
    shared_by_ends: frozenset[str] = frozenset()
    """Names of parameters that the first and the last stage both hold."""
    copies: frozenset[str] = frozenset()
    """Names of this rank's parameters that tp rank 0, or an earlier stage, holds too and counts."""

    def part(self, name: str) -> Part:
        """This rank's part of a parameter before ZeRO shards it: its tp shard, or the full parameter."""
        return self.parts.get(name) or Part.whole(self.shapes[name])


def plan_model(config: ModelConfig, vocab_size: int, layout: LayoutConfig, mesh: DeviceMesh | None) -> tuple[Any, Plan]:
    """Build this rank's stage of a model on the meta device, sharded over the tp axis.

    Returns:
        The stage and the plan of its parameters.
    """
    with torch.device("meta"):
        model = cast(Any, config.build(vocab_size))
    stages = Cut.nothing(model)
    if mesh is not None and mesh["pp"].size() > 1:
        stages = cut(model, layout.split(cast(BlockCosts, config.block_costs(vocab_size))), mesh["pp"])
        (model,) = stages.own
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    rules = model.initialisers()
    if mesh is None:
        return model, Plan(shapes, rules, stages.names)
    copies = stages.shared if mesh["pp"].get_local_rank() > 0 else frozenset()
    if mesh["tp"].size() == 1:
        return model, Plan(shapes, rules, stages.names, shared_by_ends=stages.shared, copies=copies)
    found = split(model, TensorGroup(mesh["tp"].get_group(), layout.sequence_parallel, layout.loss_parallel), None)
    if mesh["tp"].get_local_rank() > 0:
        copies |= shapes.keys() - found.parts.keys()
    return model, Plan(shapes, rules, stages.names, found.parts, found.partial, stages.shared, copies)


def spread(
    deepspeed: ModuleType,
    model: Any,
    *,
    config: dict[str, Any],
    group: dist.ProcessGroup | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Allocate a model that is on the meta device, sharded by ZeRO 3. Collective; the values are undefined.

    The blocks are allocated one at a time, so that no rank ever holds the full model.

    Args:
        config: DeepSpeed's config.
        group: Process group over which the parameters are sharded; None: all ranks.
        dtype: Dtype of the weights that are used in forward and backward.
    """
    blocks = [list(block.modules()) for _, block in model.blocks()]
    in_blocks = {module for modules in blocks for module in modules}
    for modules in (*blocks, [module for module in model.modules() if module not in in_blocks]):
        for module in modules:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
            module.to_empty(device=device, recurse=False)
        held = nn.ParameterList(parameter for module in modules for parameter in module.parameters(recurse=False))
        deepspeed.zero.Init(module=held, data_parallel_group=group, config_dict_or_path=config)
    _hold_with_root(deepspeed, model)


def _hold_with_root(deepspeed: ModuleType, model: Any) -> None:
    """Keep parameters outside of the blocks gathered during the whole pass, as FSDP's root does.

    A head may use the weight of another module (a tied embedding).
    """
    in_blocks = {parameter for _, block in model.blocks() for parameter in block.parameters()}
    own = set(model.parameters(recurse=False))
    for parameter in model.parameters():
        if parameter not in in_blocks and parameter not in own:
            deepspeed.zero.register_external_parameter(model, parameter)
