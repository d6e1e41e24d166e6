"""Tracks the memory of one rank's tensors by kind, for real and for fake tensors.

    with TrackedMemory() as memory:
        memory.hold("parameters", model.parameters())
        engine.train_step(...)
        memory.begin()
        engine.train_step(...)
    memory.peak()                      # {"parameters": ..., "activations": ..., "total": ...}

The storages of each operator's results are counted from their creation until they are freed. Resizing is counted too,
because FSDP gathers into storages that it resizes. Temporary memory inside a kernel is not counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MemoryKind = Literal[
    "parameters", "gradients", "optimizer", "gathered", "gradient_buffers", "activations", "working"
]  # fmt: skip
KINDS: tuple[MemoryKind, ...] = (
    "parameters", "gradients", "optimizer", "gathered", "gradient_buffers", "activations", "working",
)  # fmt: skip
"""gathered: parameters that FSDP has gathered. gradient_buffers: gradients that FSDP reduces. activations: created in a
forward pass and alive when a backward pass begins. working: the rest, such as logits and recomputed activations."""

SHADOWS = "_propagate_tensor_meta_non_cached"
"""Method in which a DTensor infers the shape of a result from full-size tensors without memory, once per operator."""
OF_OPERATOR: dict[str, MemoryKind] = {"fsdp::all_gather_copy_in": "gathered", "fsdp::chunk_cat": "gradient_buffers"}
"""Kind of the results of FSDP's own operators. The arguments of chunk_cat are unsharded gradients of the same kind."""


@dataclass
class _Storage:
    """A tracked storage."""

    reference: Any
    size: int
    """Present size in bytes."""
    in_backward: bool
    """Whether a backward pass created the storage."""
    born: int
    """Number of backward passes that had begun at its creation."""
    died: int | None = None
    """Number of backward passes that had begun when it was freed; None: it is alive."""
    kind: MemoryKind | None = None
    """The kind, if it was given or observed; None: the lifetime decides."""


class TrackedMemory(TorchDispatchMode):
    """Tracks the storages that operators create inside the `with` block, and those of tensors given to `hold`."""

    def __init__(self) -> None:
        super().__init__()
        self._all: list[_Storage] = []
        self._living: dict[int, int] = {}
        """Index in `_all` of each living storage, by its address."""
        self._events: list[tuple[int, int]] = []
        """Index in `_all` of the storage, and change of its size in bytes, in the order of time."""
        self._first = 0
        """Index of the event from which on `peak` looks for the peak."""
        self._backward_passes, self._in_backward = 0, False
        self._patches = contextlib.ExitStack()
        self._paused = False

    def __enter__(self) -> Self:
        memory, resize = self, torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            memory._see(storage, "gathered")
            return result

        self._patches.enter_context(patch.object(torch.UntypedStorage, "resize_", resized))
        propagate = getattr(ShardingPropagator, SHADOWS, None)
        if propagate is not None:

            def unseen(*arguments: Any) -> Any:
                memory._paused = True
                try:
                    return propagate(*arguments)
                finally:
                    memory._paused = False

            self._patches.enter_context(patch.object(ShardingPropagator, SHADOWS, unseen))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def hold(self, kind: MemoryKind, tensors: Iterable[Tensor | None]) -> int:
        """Set the kind of some tensors of this rank.

        Returns:
            The size of their storages in bytes.
        """
        total, seen = 0, set()
        for storage in _storages(tensors):
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                self._all[self._see(storage, kind)].kind = kind
                total += storage.nbytes()
        return total

    def begin(self) -> None:
        """Ignore everything before this call when `peak` looks for the peak."""
        self._first = len(self._events)

    def peak(self) -> dict[str, int]:
        """Bytes at the peak, by kind and in total."""
        at, _ = max(enumerate(self._totals()), key=lambda one: one[1])
        sizes: dict[int, int] = {}
        for number, change in self._events[: self._first + at]:
            sizes[number] = sizes.get(number, 0) + change
        found: dict[str, int] = dict.fromkeys(KINDS, 0)
        for number, size in sizes.items():
            found[self._kind(self._all[number])] += size
        return {**found, "total": sum(found.values())}

    def _totals(self) -> Iterator[int]:
        """Total bytes at the last `begin`, and after each event since."""
        total = sum(change for _, change in self._events[: self._first])
        yield total
        for _, change in self._events[self._first :]:
            total += change
            yield total

    def _kind(self, storage: _Storage) -> MemoryKind:
        if storage.kind is not None:
            return storage.kind
        ended = self._backward_passes if storage.died is None else storage.died
        return "activations" if not storage.in_backward and ended > storage.born else "working"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self._in_backward:
            self._backward_passes += 1
        self._in_backward = in_backward
        result = func(*args, **(kwargs or {}))
        if self._paused:
            return result
        kind = OF_OPERATOR.get(func._schema.name)
        for storage in _storages(tree_leaves(result)):
            self._see(storage, kind)
        if kind == "gradient_buffers":
            for storage in _storages(tree_leaves((args, kwargs))):
                self._see(storage, kind)
        return result

    def _see(self, storage: torch.UntypedStorage, kind: MemoryKind | None) -> int:
        """Record a storage and its size, and return its index in `_all`."""
        size, number = storage.nbytes(), self._living.get(storage._cdata)
        if number is None:
            number = self._living[storage._cdata] = len(self._all)
            ended = partial(_ended, weakref.ref(self), number, storage._cdata)
            reference = weakref.ref(storage, ended)
            self._all.append(_Storage(reference, 0, self._in_backward, self._backward_passes))
        one = self._all[number]
        if kind is not None and one.kind is None:
            one.kind = kind
        if size != one.size:
            self._events.append((number, size - one.size))
            one.size = size
        return number

    def _end(self, number: int, address: int) -> None:
        one = self._all[number]
        self._events.append((number, -one.size))
        one.size, one.died = 0, self._backward_passes
        if self._living.get(address) == number:
            del self._living[address]


def _ended(memory: weakref.ref[TrackedMemory], number: int, address: int, _: Any) -> None:
    found = memory()
    if found is not None:
        found._end(number, address)


def _storages(tensors: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if isinstance(local, Tensor):
            yield local.untyped_storage()
