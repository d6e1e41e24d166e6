"""Our models as DeepSpeed takes them: plain tensors, of this rank's parts where ranks share the matrices."""

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
    """Names and shapes of this rank's parameters, taken before ZeRO 3 empties the tensors of the built model."""

    shapes: dict[str, torch.Size]
    """Full (unsharded) shapes of the parameters of this rank's stage, by qualified name, in the model's order."""
    initialisers: dict[str, Init]
    all_names: tuple[str, ...]
    """Parameters of all stages."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """This rank's part of those that are split over tp."""
    partial: frozenset[str] = frozenset()
    """Whole ones whose gradients are to be summed over tp."""
    shared_by_ends: frozenset[str] = frozenset()
    """Those that the first and the last stage both hold."""
    copies: frozenset[str] = frozenset()
    """Those of this rank that another rank of its tp group, or an earlier stage, has too."""

    def part(self, name: str) -> Part:
        """What this rank has of a parameter before ZeRO spreads it."""
        return self.parts.get(name) or Part.whole(self.shapes[name])


def plan_model(config: ModelConfig, vocab_size: int, layout: LayoutConfig, mesh: DeviceMesh | None) -> tuple[Any, Plan]:
    """This rank's stage of a model, on the meta device, its matrices split over tp, and what it is made of."""
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
    """Give a model on meta its memory as ZeRO 3 has it, a block at a time, so that no rank ever holds it whole.

    Collective; the values are undefined.

    Args:
        config: DeepSpeed's.
        group: Over which the parameters are spread; None: all ranks.
        dtype: Of the weights that compute.
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
    """Gather what is in no block for the whole pass, as FSDP's root does: a head may use another module's weight."""
    in_blocks = {parameter for _, block in model.blocks() for parameter in block.parameters()}
    own = set(model.parameters(recurse=False))
    for parameter in model.parameters():
        if parameter not in in_blocks and parameter not in own:
            deepspeed.zero.register_external_parameter(model, parameter)
