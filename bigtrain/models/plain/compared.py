"""Results and state of passes of a plain module, and their comparison."""

from __future__ import annotations

import math
import random
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bigtrain
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
        network.copied_extra_state(),
    )


@torch.no_grad()
def restore(network: Network, state: State) -> None:
    for name, buffer in network.named_buffers():
        if name in state.buffers:
            buffer.copy_(state.buffers[name])
    network.set_extra_state_of_modules(state.extra)


def attributes_of(network: Network, start: State | None = None) -> dict[str, list[Any]]:
    """Copies of what the attributes of all modules hold, by qualified name, without parameters and buffers.

    Args:
        start: If given, buffers that it does not have are included.
    """
    own = {id(one) for one in (*network.modules(), *network.parameters(), *network.buffers())}
    found = {}
    for prefix, module in network.network.named_modules():
        for name, value in attributes(module).items():
            found[f"{prefix}.{name}" if prefix else name] = list(leaves(value, set(own)))
    if start is not None:
        new = {name: buffer for name, buffer in network.named_buffers() if name not in start.buffers}
        found |= {name: [buffer.clone()] for name, buffer in new.items()}
    return found


_GENERATORS = {
    torch.Generator: lambda generator: generator.get_state().clone(),
    np.random.Generator: lambda generator: str(generator.bit_generator.state),
    np.random.RandomState: lambda generator: str(generator.get_state()),
    random.Random: lambda generator: generator.getstate(),
}
"""By type, the state of a random generator in a form that can be compared."""
_LIBRARIES = (sysconfig.get_path("stdlib"), "site-packages", str(Path(bigtrain.__file__).parent))
_NO_STATE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.dtype, torch.device)
_DEPTH = 6
"""How deep objects inside objects are searched for state."""


def leaves(value: Any, seen: set[int] | None = None, depth: int = 0) -> Iterator[Any]:
    """The tensors, arrays, numbers and texts that a value holds, also in containers, objects and hidden modules.

    Args:
        seen: Identities of the objects that are not searched: what is registered, and what was searched before.
    """
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        if id(value) in seen:
            return
        yield value.detach().clone()
    elif isinstance(value, np.ndarray):
        yield torch.from_numpy(value.copy()) if value.dtype.kind in "biufc" else repr(value)
    elif isinstance(value, (bool, int, float, complex, str, bytes, np.generic, type(None))):
        yield value
    elif type(value) in _GENERATORS:
        yield _GENERATORS[type(value)](value)
    elif type(value).__module__ == "itertools":
        yield repr(value)
    elif id(value) not in seen and depth < _DEPTH and not isinstance(value, _NO_STATE):
        seen.add(id(value))
        held: Any = ()
        if isinstance(value, dict):
            held = [one for pair in value.items() for one in pair]
        elif isinstance(value, (list, tuple, deque)):
            held = value
        elif isinstance(value, (set, frozenset)):
            held = sorted(value, key=repr)
        elif isinstance(value, nn.Module):
            held = [*value.state_dict().values(), *attributes(value).values(), *value.children()]
        elif isinstance(value, torch.optim.Optimizer):
            held = value.state.values()
        elif _is_users(type(value)) and hasattr(value, "__dict__"):
            held = vars(value).values()
        for one in held:
            yield from leaves(one, seen, depth + 1)


def _is_users(kind: type) -> bool:
    """Whether a class is the user's: objects of libraries, such as loggers, hold much that no pass depends on."""
    if kind is types.SimpleNamespace:
        return True
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return file is not None and not any(part in file for part in _LIBRARIES)


def has_tensor(values: list[Any]) -> bool:
    """Whether a tensor or an array is among the values of an attribute."""
    return any(isinstance(value, Tensor) for value in values)


def alike(a: list[Any], b: list[Any] | None) -> bool:
    """Whether two attributes hold equal values."""
    if b is None or len(a) != len(b):
        return False
    return all(map(_same, a, b))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and equal(a, b)
    return a is b or a == b or (a != a and b != b)  # NaN is equal to NaN here


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
