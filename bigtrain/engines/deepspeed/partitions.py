"""Finds the FP32 weights and the optimizer state of each parameter inside DeepSpeed's flat tensors, on this rank.

ZeRO 1 and 2 concatenate the parameters of a group to one flat tensor, and give each rank an equal shard of it. ZeRO 3
gives each rank an equal shard of every parameter, and concatenates these shards. In both cases a rank holds a
contiguous range of a parameter's elements, in a flat tensor that DeepSpeed's inner optimizer updates. This module
returns views of those ranges.
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
    """The range of a parameter's elements that this rank updates; empty if it updates none."""

    name: str
    part: Part
    """This rank's part of the parameter before ZeRO shards it."""
    flat: Tensor
    """FP32 weights of several parameters, 1-D; a parameter of the inner optimizer."""
    start: int
    """Index of the range's first element in `flat`."""
    begin: int
    """Index of the range's first element in the flattened part."""
    length: int
    written: bool = True
    """Whether a checkpoint saves the range from this rank."""

    def view(self, tensor: Tensor) -> FlatPart:
        """The range as a view of `flat`, or of a tensor of optimizer state of the same shape."""
        run = tensor.detach().narrow(0, self.start, self.length)
        return FlatPart(run, self.begin, self.part.shape, Box(self.part.offset, self.part.local_shape), self.written)


class Partitions:
    """This rank's shards in a started DeepSpeed engine, by qualified name.

    Args:
        engine: DeepSpeed's engine.
        optimizer: The inner optimizer; its groups have the key "names".
        parameters: The model's parameters, by qualified name.
        part: Gives this rank's part of a parameter before ZeRO shards it, by name.
        rank: This rank's index among the ranks over which ZeRO shards.
        copies: Names of parameters that another rank of the model-parallel group holds too, and saves.
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
        """Create the optimizer state that the first step would create; see `checkpoint.state`."""
        if not self._stage3:
            materialise_optimizer(self._optimizer)
            return
        # Under ZeRO 3 the optimizer's groups have parameters only during a step, one flat tensor at a time.
        for index, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            group = self._optimizer.param_groups[self._zero.sub_group_to_group_id[index]]
            group["params"] = [flat]
            materialise_optimizer(self._optimizer)
            group["params"] = []

    def state(self) -> dict[str, Tensor]:
        """FP32 weights and optimizer state, with the keys of `checkpoint.state.flatten`."""
        state: dict[str, Tensor] = {f"model.{owned.name}": owned.view(owned.flat) for owned in self.owned}
        for owned in self.owned:
            for key, value in self._optimizer.state.get(owned.flat, {}).items():
                if value is None:
                    continue
                # Other shapes are step counts, which all parameters in `flat` share.
                shown = owned.view(value) if value.shape == owned.flat.shape else value
                state[f"optimizer.{owned.name}.{key}"] = shown
        return state

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that the inner optimizer uses at this moment, by qualified name.

        They exist only during its step. Under ZeRO 3 they are those of one flat tensor at a time.
        """
        updated = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        return {
            owned.name: owned.view(owned.flat.grad)
            for owned in self.owned
            if id(owned.flat) in updated and owned.flat.grad is not None
        }

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the FP32 weights to the weights that forward and backward use. Collective."""
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
        """Names of the parameters in the model's order, each with the index of its optimizer group."""
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
        # The last shards of a parameter may be padded, or consist of padding only.
        begin = min(self._rank * share, count)
        return flat, start, begin, min(share, count - begin)
