"""Steps of a plain module: what is added to forward and backward so that the result is equal at every layout."""

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
    """Runs the passes of a plain module on this rank, and adjusts its gradients and buffers."""

    def __init__(self, network: Network, mesh: DeviceMesh | None, seed: int, device: torch.device) -> None:
        """Collect the parameters and the modules that need special treatment.

        Args:
            network: The plain module, wrapped.
            mesh: The axes over which gradients are summed; None in a single process.
            seed: The run's seed.
            device: This rank's device.
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
        """Unsharded parameters, which every rank holds; FSDP does not sum their gradients."""
        self._updates = any(network.with_after_step())

    def begin(self, part: Part) -> None:
        """Make the next passes compute the loss of a part."""
        self.network.part = part.name or None

    @contextmanager
    def passing(self, step: int, arrays: MicroBatch, number: int, passes: int) -> Iterator[Batch]:
        """A context for one training pass, which yields the batch. Forward and backward must run inside it.

        Args:
            number: Index of the micro-batch in the step, from 0.
            passes: Number of micro-batches of the step.
        """
        self._step = step
        part = self.network.part
        with self._passing(f"{step}" if part is None else f"{step} {part}", arrays, number, passes) as batch:
            yield batch

    @contextmanager
    def evaluating(self, arrays: MicroBatch) -> Iterator[Batch]:
        """A context for one evaluation pass, which yields the batch. Autograd is on only if `forward` needs it."""
        grad: AbstractContextManager[Any] = torch.set_grad_enabled(self.network.facts.needs_grad)
        with grad, self._passing("evaluation", arrays, 0, 1) as batch:
            yield batch

    @contextmanager
    def _passing(self, place: str, arrays: MicroBatch, number: int, passes: int) -> Iterator[Batch]:
        arrays, rows = without_fillers(arrays)
        batch = to_device(arrays, self._device)
        batch["step"] = torch.tensor(self._step, device=self._device)
        # All passes of a step start from one seed on all ranks: a draw for the global batch is equal at every layout.
        reseed(self._seed, place)
        with self.network.passing(batch, rows, number, passes):
            yield batch

    def after_backward(self, weight: Tensor) -> None:
        """Sum gradients that FSDP does not sum over the ranks, and apply the gradient hooks of parameters.

        Args:
            weight: Sum of this rank's weights, a scalar.
        """
        if self.network.weight is not None:
            for one in self._trained.values():
                if one.grad is not None:
                    local(one.grad).mul_(self.network.weight)
        if self._mesh is not None:
            by_data = self.network.facts.by_data
            for parameter in self.whole:
                if parameter.grad is None and not by_data:
                    continue  # on every rank: the optimizer skips it, as in one process
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                _sum_over(parameter.grad, self._mesh)
            if by_data:
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
        """Set `grad` to None where no rank used a parameter, so that the optimizer skips it as in one process."""
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
        """Restore the buffers that the passes have changed, if the update was skipped.

        Args:
            bad: Boolean scalar: whether the update was skipped.
        """
        self.network.take_back_where(bad)

    def after_step(self, bad: list[Tensor]) -> None:
        """Call the `after_step` method of each submodule that has one, unless an update was skipped.

        Args:
            bad: For each update of the step, whether it was skipped; boolean scalars.
        """
        if not self._updates or any(map(bool, bad)):
            return
        reseed(self._seed, f"after {self._step}")  # passes of the ranks may have drawn different numbers of values
        with torch.no_grad(), whole_parameters(self.network):
            self.network.after_step()


@contextmanager
def whole_parameters(network: nn.Module) -> Iterator[None]:
    """A context in which modules hold full (unsharded) FP32 parameters; changes to them are kept. Collective."""
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
    """The slices of the full tensor that a shard occupies."""
    sizes, offset = compute_local_shape_and_global_offset(shard.shape, shard.device_mesh, shard.placements)
    return tuple(slice(at, at + size) for at, size in zip(offset, sizes, strict=True))


def _sum_over(tensor: Tensor, mesh: DeviceMesh) -> None:
    for axis in range(mesh.ndim):
        dist.all_reduce(tensor, group=mesh.get_group(axis))


@torch.no_grad()
def _change(gradient: Tensor, functions: list[Callable[[Tensor], Tensor | None]], weight: float) -> None:
    """Apply hooks to a gradient, in place. The hooks see the full gradient of the mean loss, as in one process.

    Args:
        gradient: Gradient of the sum of losses over all ranks; it may be sharded.
        functions: The hooks. Each returns a new gradient, or None for no change.
        weight: Sum of weights over all ranks.
    """
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
