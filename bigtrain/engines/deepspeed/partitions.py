"""Where the FP32 weights and the optimizer's state of each parameter lie inside DeepSpeed, on this rank.

ZeRO 1 and 2 lay the parameters of a group end to end and give each rank an equal part of that line; ZeRO 3 gives each
rank an equal part of every parameter and lays those end to end. Either way a rank holds a run of a parameter's
elements, inside a flat tensor that DeepSpeed's inner optimizer works on: what is shown here are views of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.checkpoint.flat import Box, FlatPart
from bigtrain.checkpoint.state import materialise_optimizer
from bigtrain.models.init import Part


@dataclass(frozen=True)
class Owned:
    """The run of a parameter's elements that this rank updates; empty where it updates none."""

    name: str
    part: Part
    """What this rank has of the parameter before ZeRO spreads it."""
    flat: Tensor
    """FP32 weights of several parameters, as the inner optimizer knows them."""
    start: int
    """Where the run begins in `flat`."""
    begin: int
    """Where it begins in the part."""
    length: int
    written: bool = True
    """Whether a save takes it from this rank."""

    def view(self, tensor: Tensor) -> FlatPart:
        """The run, in `flat` or in the optimizer's state of it."""
        run = tensor.detach().narrow(0, self.start, self.length)
        return FlatPart(run, self.begin, self.part.shape, Box(self.part.offset, self.part.local_shape), self.written)


class Partitions:
    """The partitions of one started DeepSpeed engine, by qualified names.

    Args:
        engine: DeepSpeed's.
        optimizer: The inner optimizer; its groups carry "names".
        parameters: The model's, by qualified names.
        part: What this rank has of a parameter before ZeRO spreads it.
        rank: This one's number among those over which ZeRO spreads.
        copies: Parameters that another rank of the model-parallel group has too, and saves.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, nn.Parameter],
        part: Callable[[str], Part],
        rank: int,
        copies: Container[str] = (),
    ) -> None:
        self._zero: Any = engine.optimizer
        self._stage3 = engine.zero_optimization_stage() == 3
        self._optimizer = optimizer
        self._rank = rank
        find = self._in_stage_3 if self._stage3 else self._in_stage_1_or_2
        self.owned: list[Owned] = []
        for name, group in self._by_model(parameters):
            flat, start, begin, length = find(parameters[name], math.prod(part(name).local_shape), group)
            self.owned.append(Owned(name, part(name), flat, start, begin, length, name not in copies))

    def materialise_optimizer(self) -> None:
        """Give the optimizer the state that its first step would make; see `checkpoint.state`."""
        if not self._stage3:
            materialise_optimizer(self._optimizer)
            return
        # ZeRO 3 shows the optimizer its parts one at a time, only while it steps.
        for index, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            group = self._optimizer.param_groups[self._zero.sub_group_to_group_id[index]]
            group["params"] = [flat]
            materialise_optimizer(self._optimizer)
            group["params"] = []

    def state(self) -> dict[str, Tensor]:
        """As `checkpoint.state.flatten`: FP32 weights, and the optimizer's state."""
        state: dict[str, Tensor] = {f"model.{owned.name}": owned.view(owned.flat) for owned in self.owned}
        for owned in self.owned:
            for key, value in self._optimizer.state.get(owned.flat, {}).items():
                if value is None:
                    continue
                # Step counts: one for all that is updated together.
                shown = owned.view(value) if value.shape == owned.flat.shape else value
                state[f"optimizer.{owned.name}.{key}"] = shown
        return state

    def gradients(self) -> dict[str, Tensor]:
        """While the inner optimizer steps: what it is given, of the parameters that it updates now."""
        updated = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        return {
            owned.name: owned.view(owned.flat.grad)
            for owned in self.owned
            if id(owned.flat) in updated and owned.flat.grad is not None
        }

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights that compute those that `state` shows. Collective."""
        if not self._stage3:
            self._zero.update_lp_params()
            return
        zero = self._zero
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _by_model(self, parameters: dict[str, nn.Parameter]) -> Iterator[tuple[str, int]]:
        """Names in the model's order, each with the number of its group."""
        groups = {name: index for index, group in enumerate(self._optimizer.param_groups) for name in group["names"]}
        return ((name, groups[name]) for name in parameters)

    def _in_stage_1_or_2(self, parameter: Any, _: int, group: int) -> tuple[Tensor, int, int, int]:
        (flat,) = self._optimizer.param_groups[group]["params"]
        mapping = parameter._hp_mapping
        if mapping is None:
            return flat, 0, 0, 0
        place = mapping.hp_fragment_address
        return flat, place.start, mapping.lp_fragment_address.start, place.numel

    def _in_stage_3(self, parameter: Any, count: int, group: int) -> tuple[Tensor, int, int, int]:
        index, start, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        flat = self._zero.fp32_partitioned_groups_flat[index]
        share = parameter.ds_tensor.ds_numel
        # The last parts of a parameter may be filled up, or hold nothing else.
        begin = min(self._rank * share, count)
        return flat, start, begin, min(share, count - begin)
