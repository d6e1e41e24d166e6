"""What a step of a plain module needs apart from forward and backward, so that no layout changes what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from bigtrain.engines.contract import MicroBatch
from bigtrain.engines.fsdp.parts import Part
from bigtrain.engines.rank import reseed, to_device
from bigtrain.models.contract import Batch
from bigtrain.models.layers import local
from bigtrain.models.plain.network import Network, without_fillers


class PlainSteps:
    """The passes of a plain module on this rank; see the methods for what each adds."""

    def __init__(self, network: Network, mesh: DeviceMesh | None, seed: int, device: torch.device) -> None:
        """Args:
        mesh: The axes over which gradients are summed; None where this process is alone.
        """
        self.network = network
        network.is_shared = mesh is not None
        self._mesh = mesh
        self._seed = seed
        self._device = device
        self._step = 0
        named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
        self._trained = dict(named)
        self.whole: list[Tensor] = (
            [] if mesh is None else [parameter for _, parameter in named if not isinstance(parameter, DTensor)]
        )
        """Parameters that lie on every rank: FSDP does not sum their gradients."""
        self._updates: list[Any] = [
            module for module in network.modules() if callable(getattr(module, "after_step", None))
        ]

    def begin(self, part: Part) -> None:
        """Let the passes that follow compute the loss of a part."""
        self.network.part = part.name or None

    @contextmanager
    def passing(self, step: int, arrays: MicroBatch, number: int, passes: int) -> Iterator[Batch]:
        """The batch of one training pass; forward and backward belong into the block."""
        self._step = step
        part = self.network.part
        with self._passing(f"{step}" if part is None else f"{step} {part}", arrays, number, passes) as batch:
            yield batch

    @contextmanager
    def evaluating(self, arrays: MicroBatch) -> Iterator[Batch]:
        """The batch of one evaluation pass; with gradients where forward itself differentiates."""
        grad: AbstractContextManager[Any] = torch.set_grad_enabled(self.network.facts.needs_grad)
        with grad, self._passing("evaluation", arrays, 0, 1) as batch:
            yield batch

    @contextmanager
    def _passing(self, place: str, arrays: MicroBatch, number: int, passes: int) -> Iterator[Batch]:
        arrays, rows = without_fillers(arrays)
        batch = to_device(arrays, self._device)
        batch["step"] = torch.tensor(self._step, device=self._device)
        # Every pass of a step, on every rank: one draw for a whole batch is the same at every layout.
        reseed(self._seed, place)
        with self.network.passing(batch, rows, number, passes):
            yield batch

    def after_backward(self, weight: Tensor) -> None:
        """Make the gradients those of the sum of losses over all ranks, as the module's own hooks change them.

        Args:
            weight: The sum of this rank's weights.
        """
        if self._mesh is not None:
            for parameter in self.whole:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                _sum_over(parameter.grad, self._mesh)
            if self.network.facts.by_data:
                self._forget_unused()
        hooks = self.network.gradient_hooks
        if hooks:
            total = weight.clone()
            if self._mesh is not None:
                dist.all_reduce(total)
            for name, functions in hooks.items():
                trained = self._trained.get(name)
                if trained is not None and trained.grad is not None:
                    _change(trained.grad, functions, float(total))

    def _forget_unused(self) -> None:
        """Leave no gradient where no rank used a parameter: an optimizer does not touch it, as in one process."""
        flags = torch.tensor(
            [parameter.grad is not None and (name in self.network.reached or bool(local(parameter.grad).any()))
             for name, parameter in self._trained.items()],
            dtype=torch.int32, device=self._device,
        )  # fmt: skip
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        for used, parameter in zip(flags.tolist(), self._trained.values(), strict=True):
            if not used:
                parameter.grad = None
        self.network.reached.clear()

    def after_update(self, bad: Tensor) -> None:
        """Undo what the passes of a skipped update did to buffers.

        Args:
            bad: Boolean, without dimensions: whether it was skipped.
        """
        self.network.take_back_where(bad)

    def after_step(self, bad: list[Tensor]) -> None:
        """Let the module do what it does after each step, unless an update was skipped.

        Args:
            bad: Of each update, as `after_update` takes it.
        """
        if self._updates and not any(map(bool, bad)):
            with torch.no_grad(), whole_parameters(self.network):
                for module in self._updates:
                    module.after_step()


@contextmanager
def whole_parameters(network: nn.Module) -> Iterator[None]:
    """Full FP32 parameters in place of this rank's shards; what the block does to them is kept. Collective."""
    holders: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                holders.setdefault(parameter, []).append((module, name))
    whole: dict[Tensor, nn.Parameter] = {}
    for shard, places in holders.items():
        assert isinstance(shard, DTensor)
        whole[shard] = nn.Parameter(shard.full_tensor().clone(), requires_grad=shard.requires_grad)
        for module, name in places:
            module._parameters[name] = whole[shard]
    try:
        yield
    finally:
        for shard, places in holders.items():
            assert isinstance(shard, DTensor)
            with torch.no_grad():
                shard.to_local().copy_(whole[shard][_box(shard)])
            for module, name in places:
                module._parameters[name] = shard  # type: ignore[assignment]


def _box(shard: DTensor) -> tuple[slice, ...]:
    """Where a shard lies in the full tensor."""
    sizes, offset = compute_local_shape_and_global_offset(shard.shape, shard.device_mesh, shard.placements)
    return tuple(slice(at, at + size) for at, size in zip(offset, sizes, strict=True))


def _sum_over(tensor: Tensor, mesh: DeviceMesh) -> None:
    for axis in range(mesh.ndim):
        dist.all_reduce(tensor, group=mesh.get_group(axis))


@torch.no_grad()
def _change(gradient: Tensor, functions: list[Callable[[Tensor], Tensor | None]], weight: float) -> None:
    """Apply hooks to a gradient of the mean loss, as in one process, in place."""
    full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    mean = full / weight if weight else full
    for function in functions:
        changed = function(mean)
        mean = mean if changed is None else changed
    result = mean * (weight or 1.0)
    if isinstance(gradient, DTensor):
        gradient.to_local().copy_(result[_box(gradient)])
    else:
        gradient.copy_(result)
