"""Results and state of passes of a plain module, and their comparison."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bigtrain.models.plain.facts import attributes, dense
from bigtrain.models.plain.network import Network

LOSS_BAND, GRADIENT_BAND = 1e-4, 1e-3
"""Relative tolerances in FP32, because parts are summed in another order. Coupling inside a batch causes far larger
differences."""


@dataclass(frozen=True)
class Result:
    """The result of a pass."""

    loss: float
    weight: float
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def away(self, other: Result) -> tuple[float, float]:
        """Differences to another result: of the loss, relative if it is above 1, and of all gradients, relative to the
        norm of this result's gradients."""
        loss = abs(self.loss - other.loss) / max(1.0, abs(self.loss))
        names = self.gradients.keys() | other.gradients.keys()
        zero = torch.zeros(())
        pairs = [(self.gradients.get(name, zero), other.gradients.get(name, zero)) for name in names]
        square = sum(float((a - b).double().square().sum()) for a, b in pairs)
        norm = math.sqrt(sum(float(a.double().square().sum()) for a, _ in pairs))
        return loss, math.sqrt(square) / max(norm, 1e-6)

    def agrees(self, other: Result) -> bool:
        loss, gradient = self.away(other)
        return loss <= LOSS_BAND and gradient <= GRADIENT_BAND and abs(self.weight - other.weight) <= 1e-3


def host_state() -> Any:
    """The states of the global generators of NumPy and `random`."""
    _, keys, position, *_ = np.random.get_state()
    return bytes(np.asarray(keys)), position, random.getstate()


@dataclass(frozen=True)
class State:
    parameters: dict[str, tuple[Tensor, int, int]]
    """Values, version counter and data address of each parameter."""
    buffers: dict[str, Tensor]
    extra: dict[str, Any]


def state_of(network: Network) -> State:
    return State(
        {name: (p.detach().clone(), p._version, p.data_ptr()) for name, p in network.named_parameters()},
        {name: buffer.clone() for name, buffer in network.named_buffers()},
        {name: module.get_extra_state() for name, module in network._with_extra_state()},
    )


@torch.no_grad()
def restore(network: Network, state: State) -> None:
    for name, buffer in network.named_buffers():
        buffer.copy_(state.buffers[name])
    for name, module in network._with_extra_state():
        module.set_extra_state(state.extra[name])


def attributes_of(network: Network) -> dict[str, Any]:
    """Copies of the attributes of all modules, by qualified name, without parameters and buffers."""
    found = {}
    for prefix, module in network.network.named_modules():
        for name, value in attributes(module).items():
            leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(value)]
            found[f"{prefix}.{name}" if prefix else name] = leaves
    return found


def has_tensor(leaves: list[Any]) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in leaves)


def alike(a: list[Any], b: list[Any] | None) -> bool:
    """Whether two attributes have equal leaves; leaves that are neither tensors, numbers nor texts are not compared."""
    if b is None or len(a) != len(b):
        return False
    for one, other in zip(a, b, strict=True):
        if isinstance(one, Tensor) or isinstance(other, Tensor):
            if not (isinstance(one, Tensor) and isinstance(other, Tensor) and equal(one, other)):
                return False
        elif isinstance(one, (bool, int, float, str, type(None))) and one != other:
            return False
    return True


def repeats(a: Result, b: Result) -> bool:
    same = a.loss == b.loss or (math.isnan(a.loss) and math.isnan(b.loss))
    return same and all(equal(value, b.gradients.get(name)) for name, value in a.gradients.items())


def equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and torch.equal(torch.nan_to_num(dense(a)), torch.nan_to_num(dense(b)))


def close(a: Tensor, b: Tensor) -> bool:
    precise = torch.complex128 if a.is_complex() else torch.float64
    return a.shape == b.shape and torch.allclose(dense(a).to(precise), dense(b).to(precise), rtol=1e-4, atol=1e-5)


def is_persistent(network: Network, name: str) -> bool:
    prefix, _, own = name.rpartition(".")
    modules = dict(network.network.named_modules())
    return own not in modules[prefix]._non_persistent_buffers_set
